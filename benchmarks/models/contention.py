"""Decode speed next to busy processes, with moec's thread pool and with TVM's.

    python -m benchmarks.models.contention [--artifact FILE] [--busy 0,1,2] [--rounds 7]
        [--tokens 40]

The script starts the busy processes, one per core that is to be kept busy. Each pool has two
processes that load one artifact (the addresses of memory make one a few percent faster than
another). In every round, all of them run in turn, next to each number of busy processes. `fair` is
the share of the machine that the threads of moec would get if all threads got the same. `kept` is
the share of `fair` that decode had: tokens per second, divided by `fair` and by the tokens per
second of the faster pool without busy processes; 1 is the full share. Without --artifact, a Mixtral
of 6 layers with random weights is compiled, which takes a minute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.runtime.process.threads import available, set_threads

POOLS = ("moec", "TVM")
PROCESSES = 2  # per pool
PROMPT = tuple(range(16))
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
BUSY = """
import os, sys
while os.getppid() == int(sys.argv[1]):  # for as long as there is a benchmark
    for _ in range(1_000_000):
        pass
"""


def build(path: Path) -> None:
    """Writes the artifact of a small model."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    import moec

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE)).to(torch.bfloat16).eval()
    moec.compile(model, torch.tensor([PROMPT]), verify=False).save(path)


def serve(artifact: str, pool: str) -> None:
    """Reads numbers of tokens, and answers each with the tokens per second of generating so
    many."""
    import moec.runtime.process.pool as pools
    from moec.runtime.call.executor import load
    from moec.runtime.text.generate import generate
    from moec.runtime.text.request import Request

    if pool == "TVM":
        pools.NAME = "that of no library"
    model = load(artifact)

    def speed(tokens: int) -> float:
        texts = generate(model, [PROMPT], Request(most=tokens))
        next(texts)  # consumes the prompt
        start = time.perf_counter()
        written = sum(1 for _ in texts)
        return written / (time.perf_counter() - start)

    speed(8)
    for line in sys.stdin:
        print(speed(int(line)), flush=True)


@contextmanager
def busy(count: int) -> Iterator[None]:
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    processes = [subprocess.Popen(command) for _ in range(count)]
    time.sleep(0.2)  # until all have started
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(artifact: str, counts: list[int], rounds: int, tokens: int) -> dict[str, list[float]]:
    """The median tokens per second of each pool, next to each number of busy processes."""
    command = [sys.executable, "-m", "benchmarks.models.contention", "--serve", artifact]
    servers = [
        (pool, subprocess.Popen([*command, pool], stdin=PIPE, stdout=PIPE, text=True))
        for pool in POOLS * PROCESSES
    ]
    speeds: dict[str, list[list[float]]] = {pool: [[] for _ in counts] for pool in POOLS}
    for number in range(rounds):
        for column, count in enumerate(counts):
            with busy(count):
                for pool, server in servers[:: 1 if number % 2 else -1]:
                    assert server.stdin is not None
                    assert server.stdout is not None
                    server.stdin.write(f"{tokens + 1}\n")
                    server.stdin.flush()
                    speeds[pool][column].append(float(server.stdout.readline()))
    for _, server in servers:
        server.communicate()
    return {pool: [statistics.median(column) for column in speeds[pool]] for pool in POOLS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifact", help="a model that writes text")
    parser.add_argument("--busy", default="0,1,2", help="numbers of busy processes, 0 first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    from moec.target.cpu import processor

    add_record_options(parser, processor())
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    counts = [int(count) for count in options.busy.split(",")]
    if counts[0] != 0:
        parser.error("--busy begins with 0: shares are those of a machine with nothing else to do")
    threads, cores, load = set_threads(), available(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or str(Path(folder) / "small.moec")
        if not options.artifact:
            build(Path(artifact))
        medians = measure(artifact, counts, options.rounds, options.tokens)
    alone = max(columns[0] for columns in medians.values())
    rows: list[dict[str, Cell]] = []
    for column, count in enumerate(counts):
        fair = min(1.0, cores / (threads + count))
        row: dict[str, Cell] = {"busy processes": count, "fair": round(fair, 2)}
        for pool in POOLS:
            row[f"{pool}, tokens/s"] = round(medians[pool][column], 1)
            row[f"{pool}, kept"] = round(medians[pool][column] / (fair * alone), 2)
        rows.append(row)
        print(row, flush=True)
    conditions = f"{threads} threads on {cores} cores, load average {load:.1f} before"
    name = Path(options.artifact).stem if options.artifact else "small Mixtral"
    record_if_asked(options, "contention", name, rows, conditions)


if __name__ == "__main__":
    main()
