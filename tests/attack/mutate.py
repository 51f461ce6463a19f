"""Seeded damage of bytes, JSON and texts, as by accidents and forgers."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

_NUMBERS = (0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**48, 2**63 - 1, 2**63, 10**30)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "T", "9**9**9**9", "(" * 300, "\x1b[2J", "../../x", "é\ud800"),
    *(-1.5, 1e308, float("inf"), float("nan"), [], {}, [[]], {"": {}}, "f32", "bf16", "i64"),
    *_NUMBERS,
)
_INTEGERS = re.compile(r"(\w+): (i(?:32|64)\[[^\]]*\])")
_STATEMENT = re.compile(r"^  (?:\w+:|return)", re.MULTILINE)
_TOKEN = re.compile(r"[A-Za-z_][\w.]*|-?\d+(?:\.\d+)?|\S")


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, numbers, pieces that are gone, doubled, moved or zero."""
    array = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        if not array:
            return bytes(draw.randbytes(draw.randint(0, 40)))
        # Half of the changes meet the headers at the start, or the directory at the end.
        edge = draw.random()
        low, high = (0, 512) if edge < 0.25 else (-2000, 0) if edge < 0.5 else (0, 0)
        start = max(0, len(array) + low) if low < 0 else 0
        stop = min(len(array), high) if high else len(array)
        at = draw.randrange(start, max(start + 1, stop))
        length = draw.choice((1, 2, 4, 8, 64, 4096))
        piece = bytes(array[at : at + length])
        match draw.randrange(7):
            case 0:
                array[at] ^= 1 << draw.randrange(8)
            case 1:
                number = draw.choice(_NUMBERS) % (1 << 8 * min(length, 8))
                array[at : at + min(length, 8)] = number.to_bytes(min(length, 8), "little")
            case 2:
                del array[at:]
            case 3:
                del array[at : at + length]
            case 4:
                array[at:at] = piece
            case 5:
                array[at : at + length] = bytes(len(piece))
            case _:
                to = draw.randrange(len(array))
                array[to : to + len(piece)] = piece
    return bytes(array)


def mutated_json(value: Any, draw: random.Random) -> Any:
    """One to three values replaced, doubled, removed or exchanged with others, anywhere in it."""
    result = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        holders = list(_holders(result))
        if not holders:
            return draw.choice(_VALUES)
        holder, key = draw.choice(holders)
        match draw.randrange(6):
            case 0:
                del holder[key]
            case 1:
                other, at = draw.choice(holders)
                holder[key] = copy.deepcopy(other[at])
            case 2 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 3 if isinstance(holder, dict):
                holder[draw.choice(("", "x", "main", "decode", "../x"))] = holder.pop(key)
            case _:
                holder[key] = copy.deepcopy(draw.choice(_VALUES))
    return result


def _holders(value: Any) -> Any:
    """Every (dict or list, key) in it."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from _holders(value[key])


def mutated_text(text: str, draw: random.Random) -> str:
    """One to four tokens replaced by others of the text or by odd ones, removed or doubled; or a
    line."""
    for _ in range(draw.randint(1, 4)):
        if draw.random() < 0.3:
            lines = text.splitlines(keepends=True) or [""]
            at, to = draw.randrange(len(lines)), draw.randrange(len(lines))
            kind = draw.randrange(3)
            lines[to:to] = [lines[at]] if kind else []
            if kind != 1:
                del lines[at]
            text = "".join(lines)
            continue
        tokens = list(_TOKEN.finditer(text))
        if not tokens:
            return text
        token = draw.choice(tokens)
        odd = str(draw.choice((*_NUMBERS, *_VALUES, "{B*S}", "$9", "<", "{", "inf", "nan", "->")))
        new = draw.choice(("", token[0] * 2, draw.choice(tokens)[0], odd, odd))
        text = text[: token.start()] + new + text[token.end() :]
    return text


def mutated_indices(text: str, draw: random.Random) -> str:
    """Arithmetic put between whole numbers of a graph and what reads them, as a forger would who
    wants to read outside of a tensor."""
    for number in range(draw.randint(1, 2)):
        value = draw.choice([*_INTEGERS.finditer(text)])
        statement = _STATEMENT.search(text, value.end())
        if statement is None:
            return text
        op = draw.choice(("add.Tensor", "mul.Tensor", "sub.Tensor", "remainder.Scalar"))
        other = draw.choice((-1, 1, 2, 3, 15, 16, 100_000, 500_000_000, *_NUMBERS))
        line = f"  far{number}: {value[2]} = aten.{op}({value[1]}) <other={other}>\n"
        readers = re.sub(
            rf"\b{value[1]}\b(?!:)", f"far{number}", text[statement.start() :],
            count=draw.randint(0, 2),  # 0: all of them
        )  # fmt: skip
        text = text[: statement.start()] + line + readers
    return text
