"""Faults planted below the judge in a trained model that continues text, and in an encoder with a
mask, both in bfloat16: every one is refused by the question that has to find it, and neither model
without. tests/verify/test_faults.py has a random model with 64 experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import nn

import moec
from moec.errors import VerificationError
from moec.ir.graph import Op, Program
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.model.compiled import CompiledModel
from moec.runtime.dtypes import Array
from moec.verify.check import check
from moec.verify.code import check_code
from tests.verify.test_faults import run_of, swapped, times, with_nan

D, E, H = 64, 8, 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.router = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, D, H) / 8)
        self.down = nn.Parameter(torch.randn(E, H, D) / 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        heads = (p(y).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -1e4)[:, None, None]
        y = nn.functional.scaled_dot_product_attention(*heads, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.last(x)
        scores, chosen = self.router(y).softmax(-1).topk(2)
        weights = torch.zeros_like(self.router(y)).scatter(-1, chosen, scores)
        hidden = nn.functional.gelu(torch.einsum("btd,edh->bteh", y, self.up))
        return x + torch.einsum("bteh,ehd,bte->btd", hidden, self.down, weights)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, D)
        nn.init.normal_(self.table.weight, std=0.1)  # so that the epsilon of norms counts
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(D)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


@pytest.fixture(scope="module", params=["tiny_moe", "encoder"])
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    if request.param == "tiny_moe":
        path: Path = request.getfixturevalue("tiny_moe")
        return moec.compile(path, verify=False)
    torch.manual_seed(0)
    example = (
        torch.randint(0, 100, (2, 11)),
        torch.arange(11).expand(2, -1) < torch.tensor([[11], [7]]),
    )
    return moec.compile(Encoder().bfloat16().eval(), example, verify=False)


def experts_of(program: Program, last: bool = True) -> tuple[str, ...]:
    """The weights of the last product of experts, or of the first."""
    products = [op for op in program.graph.ops if op.name == "grouped.linear"]
    parts = GroupedLinear.of(products[-1 if last else 0])
    return tuple(value.name for value in parts.matrices)


# ---- weights that kernels read ---------------------------------------------------------

Edit: TypeAlias = Callable[[Array], Array | None]


def with_a_zero_tile(array: Array) -> Array:
    changed = array.copy()
    changed[-1, -1] = 0
    return changed


def reversed_columns(array: Array) -> Array:
    return array.copy()[..., ::-1].copy()


IN_EXPERTS: dict[str, Edit] = {
    "two experts swapped": swapped,
    "an expert times 1.5": times(1.5, 1),
    "an expert times 1.1": times(1.1, 1),
    "an expert times 1.02": times(1.02, 1),
    "an expert negated": times(-1, 0),
    "an expert left out": times(0, 2),
    "all experts times 1.02": times(1.02),
    "a tile of zeros": with_a_zero_tile,
    "columns in another order": reversed_columns,
    "a NaN": with_nan,
}


@pytest.mark.parametrize("fault", IN_EXPERTS)
@pytest.mark.parametrize("last", [True, False], ids=["down", "up"])
def test_weights_that_kernels_read(compiled: CompiledModel, fault: str, last: bool) -> None:
    package, _ = compiled.ready()
    names = experts_of(compiled.module.main, last)
    arrays = dict(package.arrays)
    key = "+".join(names) + ".packed"
    edited = IN_EXPERTS[fault](arrays[key])
    assert edited is not None
    wrong = replace(package, arrays={**arrays, key: edited})
    with pytest.raises(VerificationError, match=r"computes .* wrong"):
        check_code(wrong, compiled.module, compiled.captured, [compiled.captured.example])


# ---- graphs that passes made -----------------------------------------------------------


def scaled(name: str, factor: float) -> Callable[[Program], Program]:
    """The program with one weight times a factor; of an expert, the second one."""

    def fault(program: Program) -> Program:
        key = experts_of(program)[0] if name == "experts" else _weight(program, name)
        weight = program.weights[key].clone()
        (weight[1] if name == "experts" else weight).mul_(factor)
        return replace(program, weights={**program.weights, key: weight})

    return fault


def _weight(program: Program, name: str) -> str:
    return next(key for key in program.weights if name in key)


def exchanged(program: Program) -> Program:
    key = experts_of(program)[0]
    weight = program.weights[key].clone()
    weight[[0, 1]] = weight[[1, 0]]
    return replace(program, weights={**program.weights, key: weight})


def attribute(op_name: str, attr: str, factor: float) -> Callable[[Program], Program]:
    def edit(op: Op) -> Op:
        value = op.attrs.get(attr)
        if not op.name.startswith(op_name) or not isinstance(value, float):
            return op
        return replace(op, attrs={**op.attrs, attr: value * factor})

    def fault(program: Program) -> Program:
        graph = program.graph
        return replace(program, graph=replace(graph, ops=tuple(map(edit, graph.ops))))

    return fault


IN_GRAPHS: dict[str, Callable[[Program], Program]] = {
    "epsilon of norms x 10": attribute("nn.", "epsilon", 10),
    "scale of attention x 1.02": attribute("nn.attention", "scale", 1.02),
    "an expert times 1.02": scaled("experts", 1.02),
    "an expert times 1.5": scaled("experts", 1.5),
    "experts exchanged": exchanged,
    "a norm times 1.01": scaled("norm", 1.01),
    "a table of tokens times 1.01": scaled("", 1.01),
}


@pytest.mark.parametrize("fault", IN_GRAPHS)
def test_graphs_that_passes_made(compiled: CompiledModel, fault: str) -> None:
    *before, last = compiled.pass_results
    program = IN_GRAPHS[fault](last.program)
    results = [*before, replace(last, program=program)]
    with pytest.raises(VerificationError, match="of the graph in float32"):
        check(compiled.captured, run_of(compiled), results)


# ---- right models ----------------------------------------------------------------------


def test_the_model_without_a_fault_is_right(compiled: CompiledModel) -> None:
    package, _ = compiled.ready()
    check(compiled.captured, run_of(compiled), compiled.pass_results)
    checked = check_code(package, compiled.module, compiled.captured, [compiled.captured.example])
    assert checked.wrong is None
    assert checked.least_rows is not None
    assert checked.least_rows >= 20
