"""The systems at their published sizes: built with weights, counted, run, and compared compiled.

    python -m benchmarks.systems.published_sizes [--sizes S/2-8E2A,0.6B] [--compile]
        [--record FILE.jsonl]

Each model is the whole one of its file in examples/systems/, in float32 with random weights. The
script counts its parameters and runs eager once. With --compile it also compiles the model, for the
sizes of the inputs alone, and prints the number of recognised blocks and the greatest difference to
eager, as a share of the greatest value; that needs about four times the memory of the weights. It
ends with 1 if results differ. The sizes are those whose weights fit a machine of 24 GiB; the tests
count the others.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from benchmarks.systems.latency import THREADS, TOLERANCE, examples

import torch  # isort: skip
from torch import nn  # isort: skip

import moec
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.target.cpu import processor

Built = tuple[nn.Module, tuple[Any, ...], nn.Module]
"""A model, its inputs, and the part that the publication counts."""


@dataclass(frozen=True)
class Published:
    system: int
    name: str
    millions: float  # of parameters, as published
    build: Callable[[ModuleType], Built]


def momentum_smoe(name: str) -> Callable[[ModuleType], Built]:
    def build(example: ModuleType) -> Built:
        config = example.PUBLISHED[name]
        model = example.MomentumSMoE(config)
        return model, (torch.randint(config.vocabulary, (1, 16)),), model

    return build


class Recommender(nn.Module):
    """Codes of watched items [B, H], codes of a session so far [B, S] -> scores of the next."""

    def __init__(self, example: ModuleType) -> None:
        super().__init__()
        config = example.Config()
        self.encoder, self.decoder = example.Encoder(config), example.Decoder(config)

    def forward(self, history: torch.Tensor, session: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.decoder(self.encoder(history), session)
        return scores


def onerec(example: ModuleType) -> Built:
    model, codes = Recommender(example), example.Config().vocabulary
    return model, (torch.randint(codes, (2, 30)), torch.randint(codes, (2, 4))), model


def moe_plus_plus(name: str) -> Callable[[ModuleType], Built]:
    def build(example: ModuleType) -> Built:
        config = example.PUBLISHED[name][0]
        model = example.MoEPlusPlus(config)
        return model, (torch.randint(config.vocabulary, (1, 32)),), model

    return build


def mod_squad(example: ModuleType) -> Built:
    """The model with one head runs; the heads of all tasks are counted in its place."""
    config = example.PUBLISHED["base"][0]
    model = example.MultiTask(config)
    counted = nn.ModuleList([part for name, part in model.named_children() if name != "head"])
    parameters = nn.ParameterList([model.positions, model.tasks])
    counted.extend([parameters, example.Heads(config)])
    images = torch.randn(1, config.channels, config.side, config.side)
    return model, (images, torch.tensor(0)), counted


def dit_moe(name: str) -> Callable[[ModuleType], Built]:
    def build(example: ModuleType) -> Built:
        size = example.PUBLISHED[name][0]
        model = example.DiTMoE(size)
        image = torch.randn(1, size.channels, size.side, size.side)
        return model, (image, torch.tensor([999]), torch.tensor([1])), model

    return build


def robust_qa(example: ModuleType) -> Built:
    """The encoder has a published count, the head has none."""
    config = example.PUBLISHED["DistilBERT"][0]
    model = example.QA(config, example.MoE)
    inputs = (torch.randint(config.vocabulary, (1, 64)), torch.rand(1, 64))
    return model, inputs, model.encoder


SIZES = (
    Published(1, "medium", 215.7, momentum_smoe("medium")),
    Published(1, "large", 388.1, momentum_smoe("large")),
    Published(5, "0.1B", 100.0, onerec),
    Published(6, "0.6B", 600.0, moe_plus_plus("0.6B/(8+4)")),
    Published(6, "1B", 1000.0, moe_plus_plus("1B/(16+4)")),
    Published(7, "base", 195.8, mod_squad),
    Published(21, "S/2-8E2A", 199.0, dit_moe("S/2-8E2A")),
    Published(21, "B/2-8E2A", 795.0, dit_moe("B/2-8E2A")),
    Published(24, "DistilBERT", 66.4, robust_qa),
)


def measure(size: Published, example: ModuleType, compiles: bool) -> dict[str, Cell]:
    """The row of one size. Raises SystemExit if moec's results differ from eager's."""
    torch.manual_seed(0)
    model, inputs, counted = size.build(example)
    model.eval().requires_grad_(False)
    millions = sum(parameter.numel() for parameter in counted.parameters()) / 1e6
    expected = tensors(model(*inputs))
    cells: dict[str, Cell] = {
        "parameters, M": round(millions, 1),
        "published, M": size.millions,
        "difference, %": round(100 * (millions / size.millions - 1), 2),
    }
    if not all(bool(value.isfinite().all()) for value in expected):
        raise SystemExit(f"{size.name}: results are not finite")
    if compiles:
        start = time.perf_counter()
        fixed = torch.export.Dim.STATIC
        shapes = tuple(dict.fromkeys(range(value.dim()), fixed) for value in inputs)
        compiled = moec.compile(model, inputs, dynamic_shapes=shapes, verify=False, kv_cache=False)
        cells |= {"compiled in, s": round(time.perf_counter() - start), "blocks": 0}
        error = max(
            float((ours - eager).abs().max() / eager.abs().max())
            for ours, eager in zip(tensors(compiled(*inputs)), expected, strict=True)
        )
        if error > TOLERANCE:
            raise SystemExit(f"{size.name}: differs from eager by {error:.1e}")
        cells |= {"blocks": len(compiled.blocks), "error": f"{error:.0e}"}
    return cells


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="", help="names, separated by commas; all")
    parser.add_argument("--compile", action="store_true", help="compile and compare with eager")
    add_record_options(parser, processor())
    options = parser.parse_args()
    names = set(filter(None, options.sizes.split(",")))
    if unknown := names - {size.name for size in SIZES}:
        parser.error(f"no such sizes: {', '.join(sorted(unknown))}")
    torch.set_num_threads(THREADS)
    for size in SIZES:
        if names and size.name not in names:
            continue
        conditions = f"{THREADS} threads, float32; load average before {os.getloadavg()[0]:.1f}"
        ((system, example),) = examples({size.system})
        with torch.inference_mode():
            row = measure(size, example, options.compile)
        case = f"{system.replace('_', ' ')}, {size.name}"
        print(case, *(f"{key} {cell}" for key, cell in row.items()), sep="  ", flush=True)
        record_if_asked(options, "published-sizes", case, [row], conditions)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
