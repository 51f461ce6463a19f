"""One artifact per task: a multi-task model is compiled for one task, so its experts are known at
compile time.

Half of the model's layers have a gate for each task. In the others, the task alone chooses the
experts, as in a multi-task vision transformer (arXiv 2306.17165). Compiled for one task, the latter
become dense layers, and gates and experts of other tasks are removed.

A router that reads only token ids (Read-ME, arXiv 2410.19123) becomes a separate function, so that
a server can prefetch experts or group requests by expert in advance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.passes.specialise.specialise import Specialise

D, H, EXPERTS, TASKS, VOCABULARY = 256, 512, 8, 4, 512


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, H, D) / D**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, D, H) / H**0.5)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = logits.softmax(-1).topk(2, -1)
        hidden = F.gelu(torch.einsum("td,tkhd->tkh", x, self.up[ids]))
        rows = torch.einsum("tkh,tkdh->tkd", hidden, self.down[ids])
        return x + (rows * weights[..., None]).sum(1)


class ManyTasks(nn.Module):
    """x [T, D], task [] -> [T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Embedding(TASKS, EXPERTS * D) for _ in range(2))
        self.by_task = nn.ModuleList(nn.Embedding(TASKS, EXPERTS) for _ in range(2))
        self.layers = nn.ModuleList(Experts() for _ in range(4))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        for i in range(2):
            gate = self.gates[i](task).reshape(EXPERTS, D) / D**0.5
            x = self.layers[2 * i](x, F.linear(x, gate))
            x = self.layers[2 * i + 1](x, self.by_task[i](task).expand(x.shape[0], EXPERTS))
        return x


class PreGated(nn.Module):
    """ids [T] -> scores [T, VOCABULARY]; one router for all layers, which reads only ids."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Embedding(VOCABULARY, EXPERTS)
        self.embed, self.mix = nn.Embedding(VOCABULARY, D), nn.Linear(D, D)
        self.layers, self.head = (
            nn.ModuleList(Experts() for _ in range(2)),
            nn.Linear(D, VOCABULARY),
        )

    def forward(self, ids: Tensor) -> Tensor:
        logits, x = self.router(ids), self.mix(self.embed(ids))
        for layer in self.layers:
            x = layer(x, logits)
        return self.head(x)


def milliseconds(*calls: Callable[[], Any]) -> list[float]:
    """The median time of each call; calls run in turn, so that load on the machine affects all of
    them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(30):
        for entry, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            entry.append(1e3 * (time.perf_counter() - start))
    return [median(entry) for entry in times]


torch.manual_seed(0)
model, x, task = ManyTasks(), torch.randn(64, D), torch.tensor(2)
full = moec.compile(model, (x, task))
one = moec.compile(model, (x, task), passes=[Specialise({"task": 2})])
(step,) = [step for step in one.pass_results if step.says]
print("\n".join(step.says))
with torch.no_grad():
    print(f"greatest difference to eager: {float((one(x) - model(x, task)).abs().max()):.1e}\n")

print(f"{'':12}{'inputs':>10}{'blocks':>8}{'megabytes':>11}{'T=1':>10}{'T=64':>10}")
rows = {"all tasks": (full, (task,)), "task 2": (one, ())}
times = [
    milliseconds(*(lambda m=m, more=more, t=t: m(x[:t], *more) for m, more in rows.values()))
    for t in (1, 64)
]
for i, (name, (result, _)) in enumerate(rows.items()):
    inputs = ", ".join(port.name for port in result.package.main.inputs)
    size = sum(array.nbytes for array in result.package.arrays.values()) / 1e6
    print(
        f"{name:12}{inputs:>10}{len(result.blocks):8}{size:11.2f}"
        + "".join(f"{item[i]:7.3f} ms" for item in times)
    )

ids = torch.randint(VOCABULARY, (64,))
served = moec.compile(PreGated(), (ids,), passes="+hoist-routers")
choices = served.routers(ids)
for layer, chosen in choices.items():
    counts = torch.bincount(chosen["experts"].flatten(), minlength=EXPERTS)
    print(f"\n{layer}: tokens an expert will get: {counts.tolist()}", end="")
same = torch.equal(served.routed(choices, ids), served(ids))
alone, rest, both = milliseconds(
    lambda: served.routers(ids), lambda: served.routed(choices, ids), lambda: served(ids)
)
print(f"\nrouters {alone:.3f} ms, the rest {rest:.3f} ms, as one {both:.3f} ms; same bits: {same}")
