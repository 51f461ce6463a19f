"""Four passes that change a model before it is served, with one line of results each.

fold-lora       experts that share one layer and have separate adapters (Uni-MoE) become plain
                experts, which are recognised and use the kernels of experts
fold-supernet   a layer whose weights are mixed for an architecture (Mixture-of-Supernets) becomes
                the dense layer of that architecture
keep-used       a multi-task model keeps only the experts that one task uses (Mod-Squad)
aggregate       the experts of two models in one, for further training (aggregation of experts)

A line has the megabytes of weights, and the difference between the result and PyTorch's result for
the same module; for aggregate, for a module written with the experts of both models.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.stats import stored_bytes
from moec.passes.approximate.aggregate_experts import AggregateExperts
from moec.passes.approximate.keep_used import KeepUsed

D, H, E, K, T = 64, 128, 4, 2, 128


class Adapted(nn.Module):
    """A frozen layer with the adapter of one expert."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + 2.0 * self.b(self.a(x))
        return result


class Layer(nn.Module):
    """x [T, D] -> [T, D]; experts have a layer up and a layer down."""

    def __init__(self, experts: int = E, lora: bool = False) -> None:
        super().__init__()
        self.gate, up, down = nn.Linear(D, experts), nn.Linear(D, H), nn.Linear(H, D)
        self.up, self.down = (
            nn.ModuleList(
                Adapted(base) if lora else nn.Linear(base.in_features, base.out_features)
                for _ in range(experts)
            )
            for base in (up, down)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, -1)
        weights, y = weights / weights.sum(-1, keepdim=True), torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            y = y + down(F.silu(up(x))) * (weights * (ids == e)).sum(-1, keepdim=True)
        return x + y


class Mixed(nn.Module):
    """x [T, D], arch [2] -> [T, D]; the architecture has the first half of the H neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(2, E)
        self.up = nn.Parameter(torch.randn(E, H, D) / D**0.5)
        self.down = nn.Parameter(torch.randn(E, D, H) / H**0.5)

    def forward(self, x: Tensor, arch: Tensor) -> Tensor:
        share = self.router(arch).softmax(-1)
        up = torch.einsum("e,ehd->hd", share, self.up[:, : H // 2])
        down = torch.einsum("e,edh->dh", share, self.down[..., : H // 2])
        return x + F.linear(F.silu(F.linear(x, up)), down)


def joined(a: Layer, b: Layer) -> Layer:
    """A layer that has all experts of both layers."""
    result = Layer(2 * E)
    result.up, result.down = nn.ModuleList([*a.up, *b.up]), nn.ModuleList([*a.down, *b.down])
    for name in ("weight", "bias"):
        both = [getattr(layer.gate, name) for layer in (a, b)]
        setattr(result.gate, name, nn.Parameter(torch.cat(both)))
    return result


def line(
    name: str, model: nn.Module, inputs: tuple[Tensor, ...], expected: Tensor, **options: Any
) -> None:
    """Runs a pass, and prints what it changed. (No code is generated, to save time.)"""
    compiled_model = moec.compile(model, inputs, build=False, verify=False, **options)
    program = compiled_model.pass_results[-1].program
    before = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    (result,) = evaluate(program.graph, [inputs[0]], program.weights)
    off = float((result - expected).abs().max())
    says = [messages for step in compiled_model.pass_results for messages in step.says]
    says += [
        layer.says
        for step in compiled_model.pass_results
        if step.damage
        for layer in step.damage.layers
    ]
    says += [f"a block of {block.experts} experts" for block in compiled_model.blocks]
    size = f"{before:6.2f} ->{stored_bytes(program) / 1e6:5.2f} MB"
    print(f"{name:14}{size}   {off:.0e}   {'; '.join(says)}")


torch.manual_seed(0)
x = torch.randn(T, D)
with torch.no_grad():
    lora = Layer(lora=True)
    line("fold-lora", lora, (x,), lora(x), passes="+fold-lora")

    mixed, arch = Mixed(), torch.tensor([1.0, 0.5])
    line("fold-supernet", mixed, (x, arch), mixed(x, arch), passes="+fold-supernet(arch=1:0.5)")

    # A task is a region of tokens: these are between the router's rows of two or three experts.
    shared, sample = Layer(), torch.randint(2, (T, 1))
    rows = shared.gate.weight
    task = 20 * (rows[1] + sample * rows[2] + (1 - sample) * rows[3]) + torch.randn(T, D) / 8
    options = {"passes": [KeepUsed()], "calib": {"x": task}, "budget": "changed<=0.01"}
    line("keep-used", shared, (task,), shared(task), **options)

    other = Layer()
    weights = dict(other.named_parameters())
    line("aggregate", shared, (x,), joined(shared, other)(x), passes=[AggregateExperts(weights)])
