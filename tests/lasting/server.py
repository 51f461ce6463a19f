"""Many clients of one `moec serve`: `python -m tests.lasting.server ARTIFACT`.

A tenth of the requests leave at a random moment, a twentieth are malformed. Every other answer must
be what `m.generate` writes alone, the counters must add up, and the process must not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moec

ROOT = Path(__file__).parents[2]
GROWTH = 8.0  # MB that a round may add after the first
WORDS = "def class return import self.path for in range(10): x = [1, 2] # a comment\n if".split(" ")
HEAD = "".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(12))


@dataclass(frozen=True)
class Case:
    """A request, and what becomes of it: "whole", "left" after some bytes, or "malformed"."""

    body: dict[str, Any]
    fate: str
    patience: float = 0.0


@dataclass
class Outcome:
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def draw(chance: random.Random) -> Case:
    """Prompts of 1 to 300 tokens, half of which begin alike; greedy or sampled; streamed or not."""
    head = HEAD[: chance.choice([0, 0, 40, 150, 400])]
    prompt = head + " ".join(chance.choice(WORDS) for _ in range(chance.choice([1, 3, 9, 40])))
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": chance.randrange(1, 50)}
    body["temperature"], body["stream"] = 0, chance.random() < 0.5
    if chance.random() < 0.5:
        body |= {"temperature": chance.choice([0.7, 1.5]), "seed": chance.randrange(100)}
        body |= chance.choice([{}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.1}])
        body["n"] = chance.choice([1, 1, 2, 3])
    body |= chance.choice([{}, {}, {"stop": ["\n", "self"]}, {"repetition_penalty": 1.3}])
    body |= chance.choice(
        [{}, {}, {}, {"response_format": {"type": "regex", "regex": "[a-z]{3,9}"}}]
    )
    fate = chance.random()
    if fate < 0.1:
        return Case(body, "left", chance.random() * 0.2)
    if fate < 0.15:
        wrong = [{"max_tokens": 0}, {"temperature": "x"}, {"prompt": [5000]}, {"colour": 1}]
        return Case(body | chance.choice(wrong), "malformed")
    return Case(body, "whole")


def expected(model: moec.LoadedModel, body: dict[str, Any]) -> list[str]:
    options = {k: v for k, v in body.items() if k not in ("prompt", "stream", "n", "max_tokens")}
    prompts = [body["prompt"]] * body.get("n", 1)
    texts = model.generate(prompts, max_new_tokens=body["max_tokens"], **options)
    return [text[len(body["prompt"]) :] for text in texts]


async def ask(port: int, case: Case) -> tuple[int, list[str]]:
    """The status and the texts; those of a stream joined. Status 0: it was left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(case.body).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close"]
    head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + content)
    try:
        if case.fate == "left":
            await asyncio.sleep(case.patience)
            return 0, []
        answer = await reader.read()
    finally:
        writer.close()
    status = int(answer.split(b" ", 2)[1])
    headers, _, rest = answer.partition(b"\r\n\r\n")
    if b"chunked" in headers:
        rest = re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", rest)
    text = rest.decode()
    if status != 200:
        return status, [json.loads(text)["error"]["message"]]
    if not case.body["stream"]:
        return status, [choice["text"] for choice in json.loads(text)["choices"]]
    events = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    texts = [""] * case.body.get("n", 1)
    if events[-1] != "[DONE]":
        return 500, events[-1:]
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            texts[choice["index"]] += choice["text"]
    return status, texts


async def run(port: int, cases: list[Case], answers: list[list[str]], concurrency: int) -> Outcome:
    outcome, semaphore = Outcome(), asyncio.Semaphore(concurrency)

    async def one(case: Case, texts: list[str]) -> None:
        async with semaphore:
            try:
                status, received = await ask(port, case)
            except (OSError, ValueError, IndexError) as error:
                outcome.faults.append(f"{type(error).__name__}: {error}: {case}")
                return
        outcome.counts[f"{case.fate} {status}"] += 1
        right = {"left": 0, "malformed": 400, "whole": 200}[case.fate]
        if status != right or (status == 200 and received != texts):
            outcome.faults.append(f"{status} {received!r} instead of {texts!r}: {case}")

    await asyncio.gather(*map(one, cases, answers))
    return outcome


def metrics(port: int) -> dict[str, float]:
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    return {
        match[1] + match[2]: float(match[3])
        for match in re.finditer(r"^moec:(\w+)\{(.*?)\} (\S+)$", text, re.MULTILINE)
    }


def idle(port: int, seconds: float = 30.0) -> dict[str, float]:
    """The metrics when no text runs or waits."""
    end = time.monotonic() + seconds
    while True:
        values = metrics(port)
        waits = [v for name, v in values.items() if name.startswith("num_requests_")]
        if not any(waits):
            return values
        if time.monotonic() > end:
            raise AssertionError(f"texts still run or wait: {waits}")
        time.sleep(0.1)


def resident(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def serve(path: Path, count: int, rounds: int, seed: int, concurrency: int = 100) -> list[str]:
    """What was wrong, in sentences."""
    model = moec.load(path)
    chance = random.Random(seed)
    cases = [draw(chance) for _ in range(count)]
    answers = [expected(model, case.body) if case.fate == "whole" else [] for case in cases]
    command = [sys.executable, "-m", "moec", "serve", str(path), "--port", "0", "--slots", "16"]
    command += ["--context", "512", "--queue", str(4 * concurrency)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    faults, sizes, texts = [], [], 0.0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            address = re.search(r":(\d+)/v1", line)
            assert address, line + child.stderr.read()
            port = int(address[1])
            for number in range(rounds):
                start = time.perf_counter()
                outcome = asyncio.run(run(port, cases, answers, concurrency))
                faults += outcome.faults
                values = idle(port)
                ended = sum(v for name, v in values.items() if name.startswith("request_success_t"))
                sizes.append(resident(child.pid))
                if number and ended - texts > 3 * count:
                    faults.append(f"{ended - texts} texts ended in a round")
                texts = ended
                print(
                    f"round {number}: {dict(outcome.counts)}, {len(outcome.faults)} faults, "
                    f"{ended:.0f} texts ended, {sizes[-1]:.0f} MB, "
                    f"{time.perf_counter() - start:.1f} s",
                    flush=True,
                )
            if len(sizes) > 2 and sizes[-1] - sizes[1] > GROWTH:
                faults.append(f"the process grew: {sizes} MB")
            child.send_signal(signal.SIGTERM)
            if (code := child.wait(30)) != 0:
                faults.append(f"the exit code is {code}: {child.stderr.read()}")
        finally:
            child.kill()
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lasting.server", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = serve(options.artifact, options.requests, options.rounds, options.seed)
    for fault in faults[:20]:
        print(fault[:1000])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
