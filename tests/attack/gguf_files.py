"""Damage of GGUF files, each certain to be wrong: a reader has to refuse every one."""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
ALIGNMENT = 32
HUGE = (2**31, 2**32 - 1, 2**48, 2**60, 2**63, 2**64 - 1)
_F32, _Q8_0 = 0, 8


def text(content: str | bytes) -> bytes:
    """A string as the file stores it."""
    content = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(content)) + content


def number(value: int) -> tuple[int, bytes]:
    return U32, struct.pack("<I", value)


def real(value: float) -> tuple[int, bytes]:
    return F32, struct.pack("<f", value)


@dataclass
class Entry:
    """A tensor of the header. `offset` None is where its bytes are put."""

    name: bytes
    sizes: list[int]
    kind: int
    content: bytes
    offset: int | None = None
    dimensions: int | None = None


@dataclass
class Draft:
    """A file to damage: fields by name, each a type and its bytes, and tensors. `tensors_count` and
    `fields_count` are the true ones where they are None."""

    architecture: str
    fields: list[tuple[bytes, int, bytes]]
    tensors: list[Entry]
    magic: bytes = b"GGUF"
    version: int = 3
    tensors_count: int | None = None
    fields_count: int | None = None
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    def replace(self, name: str, kind: int, content: bytes) -> None:
        """Sets a field, new or old."""
        key = name.encode()
        entries = [entry for entry in self.fields if entry[0] != key]
        self.fields = [*entries, (key, kind, content)]

    def remove(self, name: str) -> None:
        self.fields = [entry for entry in self.fields if entry[0] != name.encode()]

    def tensor(self, part: str) -> Entry:
        return next(entry for entry in self.tensors if part.encode() in entry.name)

    def encode(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensors_count is None else self.tensors_count,
            len(self.fields) if self.fields_count is None else self.fields_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        for name, kind, content in self.fields:
            head += text(name) + struct.pack("<I", kind) + content
        data = b""
        for entry in self.tensors:
            offset = len(data) if entry.offset is None else entry.offset
            dimensions = len(entry.sizes) if entry.dimensions is None else entry.dimensions
            head += text(entry.name) + struct.pack("<I", dimensions)
            head += b"".join(struct.pack("<Q", size % 2**64) for size in entry.sizes)
            head += struct.pack("<IQ", entry.kind, offset % 2**64)
            data += entry.content + bytes(-len(entry.content) % ALIGNMENT)
        head += bytes(-len(head) % ALIGNMENT)
        self.spans = {"header": (0, len(head)), "data": (len(head), len(head) + len(data))}
        return head + data


def draft(architecture: str = "llama") -> Draft:
    """A model of one layer with four experts, which moec reads: a llama, or a deepseek2."""
    fields = {
        "general.architecture": (STRING, text(architecture)),
        **{f"{architecture}.{name}": number(v) for name, v in _NUMBERS[architecture].items()},
        f"{architecture}.attention.layer_norm_rms_epsilon": real(1e-6),
        f"{architecture}.rope.freq_base": real(10000.0),
    }
    entries = [
        Entry(n.encode(), [*sizes], *content) for n, sizes, content in _tensors(architecture)
    ]
    return Draft(architecture, [(name.encode(), *value) for name, value in fields.items()], entries)


_COMMON = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "expert_count": 4,
    "expert_used_count": 2,
}
_NUMBERS = {
    "llama": _COMMON,
    "deepseek2": _COMMON
    | {
        **{"attention.kv_lora_rank": 32, "attention.key_length": 48, "attention.value_length": 32},
        **{"attention.key_length_mla": 48, "attention.value_length_mla": 32},
        **{"rope.dimension_count": 16, "expert_feed_forward_length": 96, "expert_shared_count": 1},
        "expert_gating_func": 2,
    },
}
_OF_BOTH = {
    "token_embd": (64, 96),
    "output_norm": (64,),
    "output": (64, 96),
    "blk.0.attn_norm": (64,),
    "blk.0.ffn_norm": (64,),
    "blk.0.ffn_gate_inp": (64, 4),
    "blk.0.ffn_gate_exps": (64, 96, 4),
    "blk.0.ffn_up_exps": (64, 96, 4),
    "blk.0.ffn_down_exps": (96, 64, 4),
}
_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": _OF_BOTH
    | {
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (64, 32),
        "blk.0.attn_v": (64, 32),
        "blk.0.attn_output": (64, 64),
    },
    "deepseek2": _OF_BOTH
    | {
        "blk.0.attn_q": (64, 192),
        "blk.0.attn_kv_a_mqa": (64, 48),
        "blk.0.attn_kv_a_norm": (32,),
        "blk.0.attn_k_b": (32, 32, 4),
        "blk.0.attn_v_b": (32, 32, 4),
        "blk.0.attn_output": (128, 64),
        "blk.0.exp_probs_b": (4,),
        "blk.0.ffn_gate_shexp": (64, 96),
        "blk.0.ffn_up_shexp": (64, 96),
        "blk.0.ffn_down_shexp": (96, 64),
    },
}


@functools.cache
def _tensors(architecture: str) -> tuple[tuple[str, tuple[int, ...], tuple[int, bytes]], ...]:
    """Names, sizes, and the type and bytes of each: random codes with one scale."""
    draw = np.random.default_rng(0)
    entries = []
    for name, sizes in _SIZES[architecture].items():
        count = int(np.prod(sizes))
        if len(sizes) == 1 or "inp" in name:
            content = (_F32, draw.standard_normal(count, np.float32).tobytes())
        else:
            blocks = draw.integers(0, 256, (count // 32, 34), np.uint8)
            blocks[:, :2] = np.frombuffer(np.float16(0.003).tobytes(), np.uint8)
            content = (_Q8_0, blocks.tobytes())
        ending = "bias" if "probs" in name else "weight"
        entries.append((f"{name}.{ending}", sizes, content))
    return tuple(entries)


Damage = Callable[[Draft, random.Random], None]


def _count(name: str) -> Damage:
    def damage(file: Draft, draw: random.Random) -> None:
        least = len(file.tensors if name == "tensors_count" else file.fields) + 1
        setattr(file, name, draw.choice((least, *HUGE)))

    return damage


def _long_string(file: Draft, draw: random.Random) -> None:
    content = struct.pack("<Q", draw.choice(HUGE)) + b"x" * draw.randint(0, 20)
    file.replace("general.name", STRING, content)


def _long_array(file: Draft, draw: random.Random) -> None:
    kind = draw.choice((0, U32, F32, STRING, U64))
    file.replace("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", kind, draw.choice(HUGE)))


def _nested_array(file: Draft, draw: random.Random) -> None:
    depth = draw.choice((1, 3, 5000))
    file.replace("general.tags", ARRAY, struct.pack("<IQ", ARRAY, 1) * depth)


def _type_of_field(file: Draft, draw: random.Random) -> None:
    at = draw.randrange(len(file.fields))
    name, _, content = file.fields[at]
    file.fields[at] = name, draw.choice((13, 14, 99, *HUGE[:2])) % 2**32, content


def _no_utf8(file: Draft, draw: random.Random) -> None:
    bad = draw.choice((b"\xff\xfe", b"\xc3", b"a\x80", b"\xed\xa0\x80"))
    match draw.randrange(3):
        case 0:
            file.replace("general.name", STRING, text(bad))
        case 1:
            file.fields.append((bad, *number(1)))
        case _:
            draw.choice(file.tensors).name += bad


def _offset(file: Draft, draw: random.Random) -> None:
    """Past the end, not aligned, or inside another tensor."""
    entry = draw.choice(file.tensors[1:])
    total = sum(len(each.content) for each in file.tensors)
    entry.offset = draw.choice((total + ALIGNMENT, 2**60, 2**64 - ALIGNMENT, 1, 0, ALIGNMENT))


def _sizes(file: Draft, draw: random.Random) -> None:
    """A size that is no size of the weight: far too large, zero, or one more."""
    entry = draw.choice([each for each in file.tensors if len(each.sizes) > 1])
    at = draw.randrange(len(entry.sizes))
    entry.sizes[at] = draw.choice((*HUGE, 0, entry.sizes[at] - 1))


def _dimensions(file: Draft, draw: random.Random) -> None:
    draw.choice(file.tensors).dimensions = draw.choice((0, 5, 255, 2**32 - 1))


def _product(file: Draft, draw: random.Random) -> None:
    """Sizes whose product is 0 or small in 64 bits."""
    entry = file.tensor("ffn_gate_exps")
    entry.sizes = draw.choice(([2**32, 2**32, 1], [2**62, 4, 1], [32, 2**59, 2**5]))


def _type(file: Draft, draw: random.Random) -> None:
    draw.choice(file.tensors).kind = draw.choice((4, 5, 16, 40, 99, 2**32 - 1))


def _another_type(file: Draft, draw: random.Random) -> None:
    """Float32 for the bytes of Q8_0: it passes the end, or the next tensor begins before."""
    file.tensors[-1].kind = _F32


def _alignment(file: Draft, draw: random.Random) -> None:
    value = draw.choice((number(0), number(3), number(2**31), real(32.0), (STRING, text("32"))))
    file.replace("general.alignment", *value)


def _twice(file: Draft, draw: random.Random) -> None:
    if draw.random() < 0.5:
        file.tensors.append(draw.choice(file.tensors))
    else:
        name, *_ = draw.choice(file.fields)
        file.fields.append((name, *number(7)))


def _magic(file: Draft, draw: random.Random) -> None:
    if draw.random() < 0.5:
        file.magic = draw.choice((b"GGUX", b"FUGG", b"\0\0\0\0", b"ggml", b"PK\3\4"))
    else:
        file.version = draw.choice((0, 1, 4, 3 << 24, 2**32 - 1))


def _value(file: Draft, draw: random.Random) -> None:
    """A number of the model that is none, or of another type."""
    name = draw.choice([*_NUMBERS[file.architecture]])
    values = (
        *((STRING, text("64")), (BOOL, b"\1"), real(float("nan")), real(-1.0), real(1.5)),
        *((U64, struct.pack("<Q", huge)) for huge in (2**31, 2**48, 2**60)),
        (ARRAY, struct.pack("<IQI", U32, 1, 4)),
        (11, struct.pack("<q", -1)),
    )
    file.replace(f"{file.architecture}.{name}", *draw.choice(values))


_MAY_BE_ZERO = (
    *("context_length", "attention.value_length"),
    *("attention.key_length_mla", "attention.value_length_mla"),
)
"""Sizes that shapes say too, or that older files lack and other fields have."""


def _zero(file: Draft, draw: random.Random) -> None:
    names = [name for name in _NUMBERS[file.architecture] if name not in _MAY_BE_ZERO]
    file.replace(f"{file.architecture}.{draw.choice(names)}", *number(0))


def _unknown(file: Draft, draw: random.Random) -> None:
    """A field that may change the model, and another type of scaling."""
    name, value = draw.choice(
        (
            ("attention.clamp_kqv", real(8.0)),
            ("final_logit_softcapping", real(30.0)),
            ("rope.scaling.type", (STRING, text("longrope"))),
            ("rope.scaling.type", number(3)),
            ("rope.scaling.factor", real(float("nan"))),
            ("rope.scaling.attn_factor", real(2.0)),
            ("expert_gating_func", number(7)),
            ("expert_weights_norm", number(3)),
            ("nextn_predict_layers", number(1)),
            ("nextn_predict_layers", (STRING, text("1"))),
        )
    )
    file.replace(f"{file.architecture}.{name}", *value)


def _real(file: Draft, draw: random.Random) -> None:
    name = draw.choice(("attention.layer_norm_rms_epsilon", "rope.freq_base"))
    values = (
        *(real(value) for value in (float("nan"), float("inf"), -float("inf"))),
        (STRING, text("1e-6")),
        (ARRAY, struct.pack("<IQf", F32, 1, 1e-6)),
    )
    file.replace(f"{file.architecture}.{name}", *draw.choice(values))


def _architecture(file: Draft, draw: random.Random) -> None:
    values = (
        *((STRING, text(name)) for name in ("", "llamma", "mamba", "../x", "x" * 3000)),
        *(number(3), (ARRAY, struct.pack("<IQ", STRING, 1) + text("llama"))),
    )
    if draw.random() < 0.2:
        file.remove("general.architecture")
    else:
        file.replace("general.architecture", *draw.choice(values))


def _lacks(file: Draft, draw: random.Random) -> None:
    """A tensor less. (Without `output` the head is that of the embeddings.)"""
    names = [entry for entry in file.tensors if not entry.name.startswith(b"output.")]
    file.tensors.remove(draw.choice(names))


def _another_name(file: Draft, draw: random.Random) -> None:
    entry = draw.choice(file.tensors)
    entry.name = draw.choice((b"x", b"", b"blk.7.attn_q.weight", b"\x1b[2J", entry.name + b".x"))


def _tokens(file: Draft, draw: random.Random) -> None:
    """A tokenizer whose lists are no lists of tokens."""
    file.replace("tokenizer.ggml.model", STRING, text(draw.choice(("gpt2", "llama"))))
    tokens = struct.pack("<IQ", STRING, 2) + text("a") + text("b")
    file.replace("tokenizer.ggml.tokens", ARRAY, tokens)
    scores = struct.pack("<IQff", F32, 2, 0.0, 0.0)
    file.replace("tokenizer.ggml.scores", ARRAY, scores)
    name, kind, content = draw.choice(
        (
            ("model", STRING, text("bert")),
            ("tokens", ARRAY, struct.pack("<IQII", U32, 2, 1, 2)),
            ("tokens", STRING, text("a b")),
            ("scores", ARRAY, struct.pack("<IQf", F32, 1, 0.0)),
            ("token_type", *number(1)),
            ("merges", ARRAY, struct.pack("<IQI", U32, 1, 1)),
            ("bos_token_id", *number(2**31)),
            ("eos_token_id", STRING, text("2")),
        )
    )
    file.replace(f"tokenizer.ggml.{name}", kind, content)


DAMAGES: Mapping[str, Damage] = {
    "more tensors": _count("tensors_count"),
    "more fields": _count("fields_count"),
    "long string": _long_string,
    "long array": _long_array,
    "nested array": _nested_array,
    "type of a field": _type_of_field,
    "no UTF-8": _no_utf8,
    "offset": _offset,
    "sizes": _sizes,
    "dimensions": _dimensions,
    "product of sizes": _product,
    "type": _type,
    "another type": _another_type,
    "alignment": _alignment,
    "twice": _twice,
    "magic": _magic,
    "value": _value,
    "zero": _zero,
    "real number": _real,
    "unknown field": _unknown,
    "architecture": _architecture,
    "lacks a tensor": _lacks,
    "another name": _another_name,
    "tokens": _tokens,
}


def _damaged(damage: Damage) -> Callable[[Path, random.Random], Path]:
    def write(folder: Path, draw: random.Random) -> Path:
        file = draft(draw.choice([*_NUMBERS]))
        damage(file, draw)
        path = folder / "model.gguf"
        path.write_bytes(file.encode())
        return path

    return write


def _truncated(folder: Path, draw: random.Random) -> Path:
    """A file that ends inside its header, or inside its data."""
    file = draft()
    content = file.encode()
    start, end = file.spans[draw.choice(("header", "data"))]
    path = folder / "model.gguf"
    # what pads the last tensor to the alignment may be absent
    path.write_bytes(content[: draw.randrange(start, end - ALIGNMENT)])
    return path


def _split(folder: Path, draw: random.Random) -> Path:
    """A model in three files, of which one is missing, or says that it is another."""
    parts = [draft() for _ in range(3)]
    for number_of, part in enumerate(parts):
        part.tensors = part.tensors[number_of::3]
        part.replace("split.no", *number(number_of))
        part.replace("split.count", *number(3))
    odd = (number(0), number(2), number(4), number(1000), number(2**16 - 1), real(3.5))
    part = draw.choice(parts)
    match draw.randrange(5):
        case 0:
            part.replace("split.count", *draw.choice((*odd, (STRING, text("3")))))
        case 1:
            others = [k for k in range(3) if parts[k] is not part] + [7, 2**31]
            part.replace("split.no", *number(draw.choice(others)))
        case 2:
            part.remove(draw.choice(("split.no", "split.count")))
        case 3:
            others_of = [p for p in parts if p is not part]
            part.tensors.append(others_of[0].tensors[0])
        case _:
            parts.remove(parts[draw.randint(1, 2)])
    for number_of, part in enumerate(parts):
        path = folder / f"model-{number_of + 1:05}-of-00003.gguf"
        path.write_bytes(part.encode())
    return folder / "model-00001-of-00003.gguf"


WRITERS: Mapping[str, Callable[[Path, random.Random], Path]] = {
    "truncated": _truncated,
    "split": _split,
    **{name: _damaged(damage) for name, damage in DAMAGES.items()},
}
