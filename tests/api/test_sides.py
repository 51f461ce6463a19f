"""Branches on sizes whose sides compute different things: each side has a program of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import ArtifactError, InputError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse
from moec.model.sides import sharing
from moec.runtime.artifact import artifact
from moec.runtime.package import side

D, E = 8, 4


class Three(nn.Module):
    """Three sides, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.more, self.many = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= 4:
            return self.few(x)
        if x.shape[1] <= 16:
            return self.more(x).relu()
        return self.many(x.cumsum(1))


class OneText(nn.Module):
    """A mask that is not read where there is one text."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if x.shape[0] == 1 else y * keep[..., None]


class FewTokens(nn.Module):
    """All experts where there are few tokens, and otherwise the two of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, D, 16) * 0.3)
        self.down = nn.Parameter(torch.randn(E, 16, D) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        shares = self.router(rows).softmax(-1)
        if len(rows) <= 6:
            h = torch.einsum("td,edh->teh", rows, self.up).relu()
            y = torch.einsum("teh,ehd->ted", h, self.down)
            return torch.einsum("te,ted->td", shares, y).view_as(x)
        weights, chosen = shares.topk(2, -1)
        y = torch.zeros_like(rows)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            z = (rows[token] @ self.up[e]).relu() @ self.down[e]
            y.index_add_(0, token, z * weights[token, slot, None])
        return y.view_as(x)


class TwoBranches(nn.Module):
    """Two results, each with a branch: four programs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x) if x.shape[0] * x.shape[1] > 24 else self.second(x)
        return y, y.mean(1) if x.shape[1] > 3 else y.amax(1)


class OneToken(nn.Module):
    """A side for one token alone. `reshape` also takes one row for another case than many."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        if x.shape[0] == 1 and x.shape[1] == 1:
            rows = rows.relu()
        y = rows.repeat(E, 1) * rows[:, :E].softmax(-1).t().reshape(-1, 1)
        return y.view(E, -1, D).cumsum(0)


class Distances(nn.Module):
    """torch.cdist has another algorithm from 26 rows on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.randn(E, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centres[None].expand(x.shape[0], -1, -1))


@dataclass(frozen=True)
class Case:
    """A module, the sizes of its example, and of calls on all sides; `sides` is how many programs
    it has beside `main`."""

    module: Callable[[], nn.Module]
    example: tuple[int, int]
    calls: Sequence[tuple[int, int]]
    sides: int

    def inputs(self, sizes: tuple[int, int]) -> tuple[Tensor, ...]:
        x = torch.randn(*sizes, D)
        return (x, (torch.rand(sizes) > 0.3).float()) if self.module is OneText else (x,)


THREE = ((1, 1), (2, 4), (1, 5), (3, 16), (2, 17), (1, 40), (0, 5))
CASES = {
    "few, of three": Case(Three, (2, 3), THREE, 2),
    "more, of three": Case(Three, (2, 12), THREE, 2),
    "many, of three": Case(Three, (2, 40), THREE, 2),
    "several texts": Case(OneText, (2, 5), ((1, 5), (1, 1), (3, 7), (2, 1)), 1),
    "one text": Case(OneText, (1, 5), ((1, 5), (1, 1), (3, 7), (2, 1)), 1),
    "many tokens": Case(FewTokens, (2, 12), ((1, 1), (2, 3), (1, 7), (4, 40), (1, 0)), 1),
    "few tokens": Case(FewTokens, (2, 3), ((1, 1), (2, 3), (1, 7), (4, 40), (1, 0)), 1),
    "two branches": Case(TwoBranches, (2, 12), ((1, 1), (2, 4), (1, 40), (9, 3), (8, 3)), 3),
    "one token": Case(OneToken, (2, 6), ((1, 1), (1, 2), (2, 1), (3, 7)), 1),
    "distances": Case(Distances, (2, 6), ((1, 1), (2, 25), (2, 26), (1, 300)), 1),
}


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


@pytest.mark.parametrize("name", CASES)
def test_both_sides_are_eagers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    module = case.module().eval()
    compiled = moec.compile(module, case.inputs(case.example))
    assert len(compiled.ready()[0].sides) == case.sides
    if case.module is FewTokens:
        (block,) = compiled.blocks
        assert block.experts == E
    compiled.save(tmp_path / "m.moec")
    loaded = moec.load(tmp_path / "m.moec")
    for sizes in case.calls:
        inputs = case.inputs(sizes)
        with torch.no_grad():
            expected = module(*inputs)
        for results in (compiled(*inputs), loaded(*inputs)):
            pairs = zip(tensors_of(results), tensors_of(expected), strict=True)
            for result, reference in pairs:
                torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)


def test_the_report_has_the_sizes_of_all_sides() -> None:
    compiled = moec.compile(Three().eval(), (torch.randn(2, 12, D),), verify=False)
    report = compiled.report()
    assert report.sizes == {"B": (0, None), "S": (0, None)}
    assert (
        "beyond these bounds the other sides of branches are compiled too: side_1, side_2"
        in report.notes
    )
    assert "calls are refused" not in str(report)


def test_a_side_that_the_user_excludes_is_not_compiled() -> None:
    shapes = {"x": {1: torch.export.Dim("S", min=5, max=16)}}
    compiled = moec.compile(
        Three().eval(), (torch.randn(2, 12, D),), dynamic_shapes=shapes, verify=False
    )
    assert compiled.ready()[0].sides == ()
    with pytest.raises(InputError, match="S from 5 to 16"):
        compiled(torch.randn(2, 17, D))


class TwoTokens(nn.Module):
    """A module that refuses one token, and branches where there are few."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 2:
            raise ValueError("one token has no neighbour")
        y = self.linear(x[:, 1:] - x[:, :-1])
        return y if x.shape[1] > 5 else y.relu()


def test_there_is_no_side_where_the_module_fails() -> None:
    compiled = moec.compile(TwoTokens().eval(), (torch.randn(2, 9, D),))
    assert [form.captured.program.graph.bounds["S"].high for form in compiled.sides] == [5]
    with pytest.raises(InputError, match="S at least 6"):
        compiled(torch.randn(2, 1, D))


def test_weights_that_sides_share_are_stored_once() -> None:
    compiled = moec.compile(FewTokens().eval(), (torch.randn(2, 12, D),), verify=False)
    shared = [compiled.module[name].weights for name in ("main", side(1))]
    addresses = [{w.data_ptr() for w in weights.values()} for weights in shared]
    assert len(addresses[0] & addresses[1]) >= 2


def test_weights_of_one_name_that_differ_have_two_names() -> None:
    """Constants that passes compute of weights may have one name in two programs."""
    text = (
        "graph main(x: f32[T, 2]; w: f32[2], v: f32[2]) {\n  y: f32[T, 2] = aten.mul.Tensor(x, w)\n"
    )
    text += "  z: f32[T, 2] = aten.add.Tensor(y, v)\n  return z\n}\n"
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    program = Program(parse(text), {"w": first.clone(), "v": second})
    shared = sharing(program, {"w": first, "v": first}, "side_1")
    assert [param.name for param in shared.graph.params] == ["w", "side_1.v"]
    assert shared.weights["w"] is first
    assert shared.weights["side_1.v"] is second
    x = torch.ones(3, 2)
    (result,) = evaluate(shared.graph, [x], shared.weights)
    torch.testing.assert_close(result, x * first + second)


def test_zero_rows_are_not_tried_where_a_product_excludes_them() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] * x.shape[1] > 6 else x[:, :1] * x.sum().item()

    compiled = moec.compile(Long(), (torch.randn(2, 12, D),))
    assert compiled.captured.program.graph.bounds["B*S"].low == 7


def test_a_side_of_few_rows_in_16_bits() -> None:
    """Its graph is evaluated too, which refuses sizes whose product is beyond its bound."""
    torch.manual_seed(1)
    module = FewTokens().bfloat16()
    compiled = moec.compile(module, (torch.randn(2, 12, D).bfloat16(),))
    for sizes in ((2, 3), (1, 7)):
        x = torch.randn(*sizes, D).bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=0.05, atol=0.05)


def test_a_call_that_no_side_takes_is_refused_by_all() -> None:
    compiled = moec.compile(Three().eval(), (torch.randn(2, 12, D),), verify=False)
    with pytest.raises(InputError, match=re.escape("axis 2 of input 'x' is 9, expected 8")):
        compiled(torch.randn(2, 3, 9))


def test_a_side_with_other_tensors_is_refused(tmp_path: Path) -> None:
    package = moec.compile(Three().eval(), (torch.randn(2, 12, D),), verify=False).ready()[0]
    forged: Any = dict(package.functions)
    first = forged[side(1)]
    forged[side(1)] = replace(first, outputs=tuple(replace(p, dtype="f64") for p in first.outputs))
    path = tmp_path / "m.moec"
    graphs = dict.fromkeys(package.functions, "")
    artifact.write(replace(package, functions=forged), path, graphs=graphs)
    with pytest.raises(ArtifactError, match="'side_1' takes or returns other tensors than 'main'"):
        artifact.read(path)


class Left(nn.Module):
    """A side that reads a number from the data, or computes an operator without a kernel."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.more, self.way = nn.Linear(D, D), way

    def forward(self, x: Tensor) -> Tensor:
        return self.more(x) if x.shape[0] > 4 else self.way(x)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (lambda x: x * 2 if x.sum() > 0 else x, "x.sum() > 0"),
        (lambda x: torch.lgamma(x.abs()), "lgamma"),
        (lambda x: x.double(), "the types of its inputs or results are others there"),
    ],
)
def test_a_side_that_is_left_out_says_why(way: Callable[[Tensor], Tensor], words: str) -> None:
    compiled = moec.compile(
        Left(way), (torch.randn(8, D),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    reasons = {line.where: line.reason for line in compiled.declined if line.rule == "sides"}
    ((where, reason),) = reasons.items()
    assert where.startswith("inputs of [")
    assert words in reason
    with pytest.raises(InputError, match="T at least 5"):
        compiled(torch.randn(2, D))
