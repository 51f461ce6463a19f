"""Requests of every route with extreme values, several at a time, to `moec serve` in a process.

A fault is an answer of 500 or none, an error without a sentence, a server that is sick, another
continuation of a plain prompt, or memory that is held.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.attack.mutate import mutated_bytes, mutated_json

ROOT = Path(__file__).parents[2]
NAME = "speaker_served.moec"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} write <tool_call>{% endif %}"
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}{{ m.tool_call_id }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}={{ c.function.arguments | tojson }}"
    "{% endfor %}\n{% endfor %}def "
)
SECONDS = 100.0  # for one answer
WARM = 12  # cases that may fill caches and pools
GROWTH = 300  # MB that the process may hold after one of them
KINDS = {200, 400, 404, 405, 413, 415, 429, 431, 503}
VOCABULARY, CONTEXT = 1024, 256

Draw = Callable[[random.Random], Any]


class Raw(str):
    """The text of a JSON value that json.dumps does not write."""


INTEGERS = (
    *(-1, 0, 1, 2, 3, 7, 20, 21, 127, 128, 129, VOCABULARY - 1, VOCABULARY, CONTEXT, CONTEXT + 1),
    *(99999999, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63), -(2**70)),
    *(Raw("9" * 4000), Raw("9" * 5000), Raw("-0"), Raw("1e3")),
)
FLOATS = (
    *(
        -2,
        -1,
        0,
        0.5,
        1,
        1.5,
        2,
        2.1,
        5e-324,
        1e-320,
        1e-45,
        1e-7,
        0.999999999,
        1e45,
        1e308,
        -1e308,
    ),
    *(Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-0.0"), Raw("1e-400")),
)
TEXTS = (
    *("", "a", " ", "\n", "def main(", "\0", "é☃😀", "\u202e\u2028", "<tool_call>", "</tool_call>"),
    *("{{ 7 * 7 }}", "a\nb", "</s>", "<|endoftext|>", "x" * 1000, "x" * 1001, "ab" * 5000),
    *("x" * 200_000, " " * 50_000, "\U0001f469\u200d" * 300, Raw('"\\ud800"'), Raw('"\\u0000"')),
)
REGEXES = (
    *(
        "a",
        "",
        "a*",
        "[a-z]{2,4}",
        r"[^\s\S]",
        r"a[^\s\S]",
        "(",
        "a|b|",
        "(a{1000}){1000}",
        "é",
        "☃+",
    ),
    *(
        "(a|b)*a(a|b){12}",
        "(?!a)b",
        "\\d+\\.\\d*",
        "." * 300,
        "(" * 500 + ")" * 500,
        "a{0}",
        "a{99999}",
    ),
    *("[\\x00-\\x1f]", "(?i)abc", "\\p{L}+", "a\nb", "$^", "\\b", "((a*)*)*", "x" * 20_000),
)
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object", "colour", 3, [])
NAMES = ("a", "b" * 64, "c" * 65, "a\n", "a b", "", "é", "f-1_x")


def dumps(value: Any) -> str:
    """JSON with the raw values in it, and lone surrogates as escapes."""
    raw: list[str] = []

    def mark(item: Any) -> Any:
        if isinstance(item, Raw):
            raw.append(str(item))
            return f"\ue000{len(raw) - 1}\ue001"
        if isinstance(item, dict):
            return {str(mark(key)): mark(each) for key, each in item.items()}
        return [*map(mark, item)] if isinstance(item, list) else item

    text = json.dumps(mark(value))
    return re.sub(r'"\\ue000(\d+)\\ue001"', lambda match: raw[int(match[1])], text)


def choice_of(values: tuple[Any, ...]) -> Draw:
    return lambda draw: draw.choice(values)


def many(one: Draw, most: int) -> Draw:
    """A list, mostly short."""
    sizes = (0, 1, 1, 2, 3, most)
    return lambda draw: [one(draw) for _ in range(draw.choice(sizes))]


def anything(draw: random.Random) -> Any:
    """A value of any kind."""
    odd = (None, True, False, [], {}, [[]], {"": {}}, [None], deep(draw.choice((50, 150, 3000))))
    return draw.choice((draw.choice(odd), integer(draw), number(draw), text(draw), words(draw)))


def deep(levels: int) -> Raw:
    return (
        Raw("[" * levels + "]" * levels)
        if levels % 100
        else Raw('{"a":' * levels + "1" + "}" * levels)
    )


integer, number = choice_of(INTEGERS), choice_of((*FLOATS, *INTEGERS))
text, regex = choice_of(TEXTS), choice_of(REGEXES)
token = choice_of((*range(3, 40), VOCABULARY - 1))
token_id = lambda draw: token(draw) if draw.random() < 0.6 else integer(draw)  # noqa: E731
words = many(text, 4)


def schema(draw: random.Random, depth: int = 0) -> Any:
    """A JSON schema, which may be wrong, or that of no value."""
    kind = draw.choice(TYPES)
    result: dict[str, Any] = {"type": kind} if draw.random() < 0.8 else {}
    for _ in range(draw.randrange(3)):
        inner = schema(draw, depth + 1) if depth < 3 else {}
        names = [draw.choice(NAMES) for _ in range(draw.randrange(3))]
        more: tuple[tuple[str, Any], ...] = (
            ("properties", dict.fromkeys(names, inner)), ("required", names), ("items", inner),
            ("enum", words(draw)), ("const", anything(draw)), ("pattern", regex(draw)),
            ("minLength", integer(draw)), ("maxLength", integer(draw)), ("minimum", number(draw)),
            ("maximum", number(draw)), ("multipleOf", number(draw)), ("minItems", integer(draw)),
            ("maxItems", integer(draw)), ("anyOf", [inner, {}]), ("allOf", [inner, {"type": kind}]),
            ("oneOf", [inner]), ("not", inner), ("$ref", draw.choice(("#", "#/$defs/x", "x:y"))),
            ("additionalProperties", draw.choice((True, False, inner))), ("format", text(draw)),
        )  # fmt: skip
        name, value = draw.choice(more)
        result[name] = value
    return result


def response_format(draw: random.Random) -> Any:
    kind = draw.choice(("regex", "json_schema", "json_object", "text", "xml"))
    result: dict[str, Any] = {"type": kind}
    if kind == "regex":
        result["regex"] = regex(draw)
    if kind == "json_schema":
        result["json_schema"] = {"name": draw.choice(NAMES), "schema": schema(draw)}
    return result


def tool(draw: random.Random) -> Any:
    function: dict[str, Any] = {"name": draw.choice(NAMES), "parameters": schema(draw)}
    if draw.random() < 0.3:
        function["description"] = text(draw)
    return {"type": "function", "function": function}


def message(draw: random.Random) -> Any:
    role = draw.choice(("system", "developer", "user", "user", "assistant", "tool", "me"))
    parts = [{"type": "text", "text": text(draw)} for _ in range(draw.randrange(3))]
    result: dict[str, Any] = {"role": role, "content": draw.choice((text(draw), parts, "x"))}
    if role == "assistant" and draw.random() < 0.5:
        arguments = draw.choice(
            ("{}", '{"x": 1}', "[]", "{", '{"x": ' + "9" * 5000 + "}", "[" * 2000)
        )
        call = {"name": draw.choice(NAMES), "arguments": arguments}
        result["tool_calls"] = [{"id": text(draw), "type": "function", "function": call}]
    if role == "tool":
        result["tool_call_id"] = text(draw)
    return result


def prompt(draw: random.Random) -> Any:
    kinds: tuple[Draw, ...] = (
        text, text, lambda _: "def f(x):\n", words, many(token_id, CONTEXT + 9),
        many(many(token_id, 40), 5), lambda _: ["a"] * 20_000, lambda _: [5] * 300_000,
    )  # fmt: skip
    return draw.choice(kinds)(draw)


FIELDS: dict[str, Draw] = {
    "n": choice_of((1, 2, 3, *INTEGERS)),
    "best_of": choice_of((1, 2, 4, *INTEGERS)),
    "echo": choice_of((True, False, 1)),
    "stop": lambda draw: draw.choice((text(draw), words(draw), [text(draw)] * 4, "e")),
    "seed": integer,
    "temperature": number,
    "top_p": number,
    "top_k": integer,
    "min_p": number,
    "typical_p": number,
    "repetition_penalty": number,
    "presence_penalty": number,
    "frequency_penalty": number,
    "logit_bias": lambda draw: draw.choice(
        (
            {str(token_id(draw)): number(draw) for _ in range(draw.randrange(4))},
            dict.fromkeys(map(str, range(VOCABULARY)), -100),
            {"9" * 5000: 1}, {"5\n": 1}, {"05": 100, "5": -100}, {"-1": 1},
        )
    ),
    "logprobs": choice_of((True, False, 0, 3, 20, *INTEGERS)),
    "top_logprobs": choice_of((0, 3, 20, *INTEGERS)),
    "min_tokens": choice_of((0, 1, 2, 4, *INTEGERS)),
    "ignore_eos": choice_of((True, False)),
    "stop_token_ids": lambda draw: draw.choice(
        (many(token_id, 20)(draw), [*range(VOCABULARY)], [*range(1000)], [integer(draw)])
    ),
    "response_format": response_format,
    "stream": choice_of((True, True, False)),
    "stream_options": choice_of(({"include_usage": True}, {"include_usage": 3}, {})),
    "suffix": text,
    "user": anything,
    "model": choice_of(("speaker_served", "speaker_served", "", "x\ny", "é" * 9000, 7)),
    "a\nb": anything,
    "x" * 20_000: anything,
}  # fmt: skip
OF_CHATS: dict[str, Draw] = {
    "tools": many(tool, 4),
    "tool_choice": lambda draw: draw.choice(
        ("none", "auto", "required", {"type": "function", "function": {"name": draw.choice(NAMES)}})
    ),
    "parallel_tool_calls": choice_of((True, False)),
    "max_completion_tokens": choice_of((1, 2, 5, *INTEGERS)),
}


def completion(draw: random.Random, chat: bool) -> dict[str, Any]:
    fields = FIELDS | OF_CHATS if chat else FIELDS
    body: dict[str, Any] = {"max_tokens": draw.choice((1, 2, 3, 6, *INTEGERS[:5]))}
    if draw.random() < 0.1:
        del body["max_tokens"]
    body |= {"messages": many(message, 40)(draw)} if chat else {"prompt": prompt(draw)}
    if draw.random() < 0.5:  # so that what is drawn is honoured
        body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "def f("}
    for name in draw.sample([*fields], draw.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        body[name] = fields[name](draw) if draw.random() < 0.93 else anything(draw)
    return body


@dataclass(frozen=True)
class Attempt:
    """A request, and whether its client leaves before the answer ends."""

    method: str
    path: str
    body: bytes | None
    leaves: bool = False


def attempt(draw: random.Random) -> Attempt:
    leaves = draw.random() < 0.05
    if draw.random() < 0.08:
        names = ("", "speaker_served", "a\nb", "é", "%", "../x", "x" * 3000)
        path = draw.choice(
            ("/health", "/ready", "/metrics", "/", "/openapi.json", "/v1/models", "/v1/moec/stats")
        )
        path += draw.choice(("", "", "/" + quote(draw.choice(names), safe=""), "?model=" + quote(
            draw.choice(names))))  # fmt: skip
        return Attempt(draw.choice(("GET", "GET", "HEAD", "DELETE", "OPTIONS")), path, None, leaves)
    path = draw.choice(
        (*["/v1/completions"] * 5, *["/v1/chat/completions"] * 5, "/v1/embeddings", "/tokenize",
         "/detokenize", "/v1/nothing")
    )  # fmt: skip
    if "completions" in path:
        body = completion(draw, "chat" in path)
    elif path == "/detokenize":
        body = {"tokens": draw.choice((many(token_id, 300)(draw), anything(draw)))}
    elif path == "/tokenize" and draw.random() < 0.4:
        body = {"messages": many(message, 9)(draw)}
    else:
        body = {
            "input" if "embed" in path else "prompt": draw.choice((prompt(draw), anything(draw)))
        }
        if draw.random() < 0.3:
            body |= draw.choice(({"encoding_format": "base64"}, {"dimensions": integer(draw)}))
    if draw.random() < 0.07:
        body = mutated_json(body, draw)
    content = dumps(body).encode(errors="surrogatepass")
    if draw.random() < 0.05:
        content = mutated_bytes(content, draw)
    return Attempt("POST", path, content, leaves)


PROBE = {"prompt": "def main(", "max_tokens": 12, "temperature": 0, "logprobs": 2}


class Server:
    """`moec serve` in a process, until this one ends."""

    def __init__(self, folder: Path) -> None:
        words_ = [sys.executable, "-m", "moec", "serve", str(folder / NAME), "--port", "0"]
        words_ += ["--slots", "4", "--queue", "40", "--context", str(CONTEXT), "--threads", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        self.log = folder / "served.txt"
        with self.log.open("ab") as stderr:
            stderr.seek(0, os.SEEK_END)
            start = stderr.tell()
            self.process = subprocess.Popen(words_, stderr=stderr, env=environment)
        atexit.register(self.process.kill)
        self.port = self._port(start)
        self.cases, self.held = 0, 0
        status, content = self.ask(Attempt("POST", "/v1/completions", dumps(PROBE).encode()))
        assert status == 200, content
        self.right = json.loads(content)["choices"]

    def _port(self, start: int) -> int:
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            with self.log.open("rb") as file:
                file.seek(start)
                if port := re.search(rb" at http://127.0.0.1:(\d+)/v1\n", file.read()):
                    return int(port[1])
            time.sleep(0.1)
        raise AssertionError(self.log.read_text(errors="replace")[-2000:])

    def ask(self, attempt: Attempt) -> tuple[int, bytes]:
        """The status, 0 for a client that left, and the content of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        headers = {"Content-Type": "application/json"} if attempt.body is not None else {}
        with contextlib.closing(connection):
            connection.request(attempt.method, attempt.path, attempt.body, headers)
            if attempt.leaves:
                return 0, b""
            response = connection.getresponse()
            return response.status, response.read()

    @property
    def megabytes(self) -> int:
        """What the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (kilobytes,) = re.findall(r"VmRSS:\s+(\d+)", status)
        return int(kilobytes) >> 10


@cache
def server(folder: Path) -> Server:
    return Server(folder)


def write_seeds(folder: Path) -> None:
    """The model that is served: the example's, with embeddings and a template of chats."""
    import shutil

    import moec

    if (folder / NAME).exists():
        return
    source = folder / "speaker_checkpoint"
    shutil.copytree(ROOT / "examples/tiny_moe/checkpoint", source, dirs_exist_ok=True)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    moec.compile(source, embeddings=True, verify=False).save(folder / NAME)


def case(folder: Path, draw: random.Random) -> list[str]:
    """The faults of one to six requests at a time, and of the server after them."""
    served = server(folder)
    attempts = [attempt(draw) for _ in range(draw.choice((1, 2, 3, 6)))]
    with ThreadPoolExecutor(len(attempts) + 1) as pool:
        company = pool.submit(answered, served, Attempt("POST", "/v1/completions",
                                                        dumps(PROBE).encode()))  # fmt: skip
        faults = [
            f"{each.method} {each.path[:80]} {(each.body or b'')[:400]!r}: {fault}"
            for each, answer in zip(attempts, pool.map(lambda a: answered(served, a), attempts),
                                    strict=True)
            if (fault := judged(each, *answer))
        ]  # fmt: skip
        status, content = company.result()
    if status != 429 and (status != 200 or json.loads(content)["choices"] != served.right):
        faults.append(f"a plain prompt is answered with {status} {content[:300]!r}")
    status, content = answered(served, Attempt("GET", "/health", None))
    if status != 200:
        faults.append(f"/health is {status} {content[:300]!r}")
    if sys.platform == "linux" and served.process.poll() is None:
        served.cases += 1
        if served.cases <= WARM:
            served.held = max(served.held, served.megabytes)
        elif (now := served.megabytes) > served.held + GROWTH and _held(served):
            faults.append(f"the process holds {now} MB, {served.held} MB after the first cases")
    return faults


def _held(served: Server) -> bool:
    """Whether the memory is still held after some seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if served.megabytes <= served.held + GROWTH:
            return False
        time.sleep(0.2)
    return True


def answered(served: Server, attempt: Attempt) -> tuple[int, bytes]:
    try:
        return served.ask(attempt)
    except (OSError, http.client.HTTPException) as error:
        return -1, repr(error).encode()


def judged(attempt: Attempt, status: int, content: bytes) -> str:
    """What is wrong with an answer; empty where nothing is."""
    if status == 0:
        return ""
    if status not in KINDS:
        return f"{status} {content[:300]!r}"
    if attempt.method == "HEAD":
        return ""
    if content.startswith(b"data: ") or content.startswith(b": "):
        *_, last = [line for line in content.decode().split("\n") if line.startswith("data: ")]
        if last == "data: [DONE]":
            return ""
        status, content = 400, last.removeprefix("data: ").encode()
    if status == 200 and attempt.path.partition("?")[0] in ("/", "/metrics"):
        return ""
    try:
        answer = json.loads(content)
        error = answer["error"] if status != 200 else None
    except (ValueError, KeyError, TypeError):
        return f"{status} {content[:300]!r}"
    if error and (
        not error["message"].strip() or (error["type"] == "server_error" and status == 400)
    ):
        return f"{status} {content[:300]!r}"
    return "" if len(content) < 4000 or not error else f"{status} with {len(content)} bytes"
