"""MoE++ (arXiv 2410.07348): how much expert time zero-computation experts save.

    python -m benchmarks.layers.zero_experts [--shapes 0.6B,1B,2B] [--tokens 2048] [--rounds 9]

For each layer shape of the paper's Table 2, two layers are compiled by `moec.compile`: a vanilla
MoE (N experts, top-2), and an MoE++ layer with the same N experts plus zero, copy and constant
experts, written as PyTorch modules, in bf16. Both take the router's logits as an input, so the
router's product is left out, as in the paper's "expert forward time". For each tau, the logits
choose each expert with a network tau times as often as one without, which training with the paper's
balance loss aims at. The load of the vanilla layer is even.

Contenders run in turn in one process. The script prints medians in milliseconds, their ratio, the
ratio that the paper measured (its Table 3), and the theoretical ratio, tau N / (tau N + Z).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moec.runtime.process.threads import set_threads

THREADS = set_threads()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import moec  # noqa: E402
from benchmarks.layers.strays import strays  # noqa: E402
from benchmarks.records import Cell, add_record_options, record_if_asked  # noqa: E402
from moec.report.profile.limits import bandwidth, peak, timed  # noqa: E402
from moec.target.cpu import processor  # noqa: E402

TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
K = 2


@dataclass(frozen=True)
class Shape:
    """A row of Table 2, and the ratios of times that follow from Table 3, by tau."""

    networks: int
    constants: int
    paper: tuple[float, ...]
    width: int = 768
    hidden: int = 2048

    @property
    def zero(self) -> int:
        """The number of zero, copy and constant experts."""
        return 2 + self.constants

    def theory(self, tau: float) -> float:
        return tau * self.networks / (tau * self.networks + self.zero)


SHAPES = {
    "0.6B": Shape(8, 2, (0.378, 0.519, 0.724, 0.799, 0.840)),
    "1B": Shape(16, 2, (0.474, 0.630, 0.769, 0.819, 0.868)),
    "2B": Shape(32, 6, (0.612, 0.693, 0.779, 0.821, 0.864)),
}


class Expert(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Constant(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.mix = nn.Linear(shape.width, 2, bias=False)
        self.vector = nn.Parameter(torch.randn(shape.width))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.mix(x).softmax(-1)
        return alpha[:, :1] * x + alpha[:, 1:] * self.vector


class Layer(nn.Module):
    """x[T, D], logits[T, N] -> y[T, D]. Columns beyond the experts are those of zero experts."""

    def __init__(self, networks: list[Expert], others: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList([*networks, *others])

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = logits.float().softmax(-1).topk(K, dim=-1)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == number)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


def logits(tokens: int, shares: Tensor) -> Tensor:
    """Logits for which each column gets exactly `shares` (one per column, sum 1) of the K * tokens
    choices, and no token chooses a column twice."""
    counts = (shares * K * tokens).floor().long()
    counts[torch.randperm(len(counts))[: K * tokens - int(counts.sum())]] += 1
    # The sorted choices are dealt out in K strides, so equal neighbours go to different tokens.
    chosen = torch.repeat_interleave(torch.arange(len(shares)), counts).reshape(K, tokens).T
    if bool((chosen[:, 0] == chosen[:, 1]).any()):
        raise SystemExit("more than half of the choices would fall on one expert")
    scores = torch.randn(tokens, len(shares)).clamp(-3, 3) - 10
    scores.scatter_(1, chosen, 1 + torch.rand(tokens, K))
    return scores[torch.randperm(tokens)]


def shares(shape: Shape, tau: float) -> Tensor:
    each = torch.tensor([tau] * shape.networks + [1.0] * shape.zero)
    return each / each.sum()


def compare(name: str, options: argparse.Namespace, conditions: str) -> bool:
    """Prints the table of one shape. Returns whether all ratios are closer to theory than the
    paper's."""
    tokens, rounds = options.tokens, options.rounds
    shape = SHAPES[name]
    networks = [Expert(shape) for _ in range(shape.networks)]
    constants = [Constant(shape) for _ in range(shape.constants)]
    layers = [Layer(networks, []), Layer(networks, [Copy(), *constants])]
    x = torch.randn(tokens, shape.width).bfloat16()
    even = torch.full((shape.networks,), 1 / shape.networks)
    inputs = [logits(tokens, even), *(logits(tokens, shares(shape, tau)) for tau in TAUS)]
    runs = []
    for layer, scores in zip(layers, inputs, strict=False):
        layer.bfloat16().requires_grad_(False).eval()
        example = (x[:7], scores[:7])
        t = torch.export.Dim("T")
        compiled = moec.compile(layer, example, dynamic_shapes=({0: t}, {0: t}), verify=False)
        if len(compiled.blocks) != 1 or compiled.blocks[0].experts != shape.networks:
            raise SystemExit(f"{name}: not recognised: {compiled.declined}")
        astray, rows = strays(compiled(x, scores), layer(x, scores), 2e-2)
        if astray:
            raise SystemExit(f"{name}: {astray} of {rows} rows differ from eager")
        runs.append(compiled)
    ways = [partial(runs[0], x, inputs[0]), *(partial(runs[1], x, scores) for scores in inputs[1:])]
    times: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    for _ in range(rounds):
        for seconds, way in zip(times, ways, strict=True):
            seconds.append(timed(way))
    vanilla, *medians = [statistics.median(seconds) for seconds in times]
    flops = K * tokens * 6 * shape.width * shape.hidden
    case = f"{name}/({shape.networks}+{shape.zero})"
    speed = f"vanilla MoE {vanilla * 1e3:.2f} ms, {flops / vanilla / 1e9:.0f} GFLOP/s"
    print(f"\n{case}: {speed}")
    rows_of_table: list[dict[str, Cell]] = []
    print("tau      ms   ratio   paper  theory", flush=True)
    nearer = True
    for tau, median, paper in zip(TAUS, medians, shape.paper, strict=True):
        ratio, theory = median / vanilla, shape.theory(tau)
        nearer &= abs(ratio - theory) < abs(paper - theory)
        print(f"{tau:4}{median * 1e3:7.2f}{ratio:8.3f}{paper:8.3f}{theory:8.3f}", flush=True)
        rows_of_table.append(
            {
                "tau": tau,
                "ms": round(median * 1e3, 2),
                "ratio": round(ratio, 3),
                "paper": round(paper, 3),
                "theory": round(theory, 3),
            }
        )
    record_if_asked(options, "zero-experts", case, rows_of_table, f"{conditions}; {speed}")
    return nearer


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    add_record_options(parser, processor())
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print(f"{Path(__file__).name}: T={options.tokens} k={K}, bf16, torch {torch.__version__}")
    load = os.getloadavg()[0]
    print(f"load average before: {load:.1f}")
    machine = (
        f"{THREADS} threads, {peak('bfloat16') / 1e9:.0f} GFLOP/s, {bandwidth() / 1e9:.1f} GB/s"
    )
    print(machine)
    conditions = f"T={options.tokens}, k={K}, bf16; {machine}; load average {load:.1f}"
    with torch.inference_mode():
        results = []
        for name in options.shapes.split(","):
            start = time.perf_counter()
            results.append(compare(name, options, conditions))
            print(f"(all of it took {time.perf_counter() - start:.0f} s)", file=sys.stderr)
    print("nearer to theory than the paper everywhere:", "yes" if all(results) else "NO")
    return 0


if __name__ == "__main__":
    sys.exit(main())
