"""Finds leaks in a long-running process: `python -m tests.lasting`.

Compiles, loads and forks, many times each, and prints the memory and the mappings of the process
after each quarter. They count as flat if the last quarter adds nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import moec

TOKENS, WIDTH = 64, 256  # products of which are worth sharing with other threads
MEMORY, MAPPINGS = 4.0, 8  # MB and mappings that the last quarter may add
_MB = 1e6


@dataclass(frozen=True)
class Footprint:
    """Of a process: megabytes that are resident, and mappings of its memory."""

    memory: float
    mappings: int


def footprint() -> Footprint:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    return Footprint(pages * os.sysconf("SC_PAGE_SIZE") / _MB, mappings)


def quarters(act: Callable[[], object], count: int) -> list[Footprint]:
    """The footprint after each quarter of `count` acts."""
    footprints = []
    for number in range(count):
        act()
        if (number + 1) % max(1, count // 4) == 0:
            footprints.append(footprint())
    return footprints


def is_flat(footprints: list[Footprint]) -> bool:
    before, last = footprints[-2:]
    return last.memory - before.memory <= MEMORY and last.mappings - before.mappings <= MAPPINGS


class Mixture(torch.nn.Module):
    """A router and four experts, dispatched by a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(WIDTH, 4, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (ids == number)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out


def forked_forward(model: moec.CompiledModel, x: torch.Tensor, expected: torch.Tensor) -> None:
    """A forward in a child, after a large one here. Raises AssertionError where it is another."""
    assert torch.equal(model(x), expected)
    child = os.fork()
    if not child:
        import signal

        signal.alarm(60)  # a child that hangs is ended
        os._exit(0 if torch.equal(model(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0, "a forward in a forked child hangs, crashes or differs"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lasting", description=__doc__)
    parser.add_argument("--compiles", type=int, default=50)
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--forks", type=int, default=20)
    counts = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, x = Mixture().eval(), torch.randn(TOKENS, WIDTH)

    def compiled() -> moec.CompiledModel:
        return moec.compile(module, (x,), verify=False)

    model = compiled()
    expected, faults = model(x), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.moec"
        model.save(path)

        def load() -> None:
            assert torch.equal(moec.load(path)(x), expected)

        for name, act, count in (
            ("compiles", compiled, counts.compiles),
            ("loads", load, counts.loads),
            ("forks", lambda: forked_forward(model, x, expected), counts.forks),
        ):
            footprints = quarters(act, count)
            flat = is_flat(footprints)
            faults += not flat
            numbers = ", ".join(f"{f.memory:.0f} MB {f.mappings}" for f in footprints)
            print(f"{count} {name}: {'flat' if flat else 'GROWS'}: {numbers} mappings", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
