"""Branches on sizes that only choose sizes: both sides are one program, which any example gives."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from torch import nn
from torch.nn import functional

import moec
from moec.capture import capture
from moec.capture.sizes import sides
from moec.capture.sizes.guards import Guard
from moec.capture.sizes.settle import settle, settled
from moec.capture.speculate.facts.singles import (
    OPERATIONS,
    Single,
    combined,
    rounded_single,
    single_of,
)
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate
from moec.ir.sizes.dims import Bounds, symbol
from tests.capture.modules import Function
from tests.capture.sized import first
from tests.fuzz.judge import interpreted

T = symbol("T")


def less(x: torch.Tensor) -> torch.Tensor:
    capacity = math.ceil(x.shape[0] * 1.25 / 4)
    if capacity < 4:
        capacity = 4
    return first(x, capacity)


def conditional(x: torch.Tensor) -> torch.Tensor:
    n, capacity = x.shape[0], x.shape[0] // 4 + 3
    return first(x, n - 1 if capacity > n - 1 else capacity)


def rounded_up(x: torch.Tensor) -> torch.Tensor:
    capacity = x.shape[0] // 3 + 1
    while capacity % 4:
        capacity += 1
    return first(x, capacity)


def early(tokens: int) -> int:
    capacity = int(tokens * 1.25 / 4)
    if capacity <= 2:
        return 2
    if capacity > 9:
        return 9
    return capacity


def float_compared(x: torch.Tensor) -> torch.Tensor:
    share = x.shape[0] / 4 * 1.1
    return first(x, 4 if share < 4 else math.ceil(share))


def buckets(x: torch.Tensor) -> torch.Tensor:
    for limit in (4, 8):
        if x.shape[0] <= 2 * limit:
            return first(x, limit)
    return first(x, x.shape[0] // 2)


def stored(x: torch.Tensor) -> torch.Tensor:
    config = {"capacity": x.shape[0] // 4}
    if config["capacity"] == 0:
        config["capacity"] = 1
    return first(x, config["capacity"])


def padded(x: torch.Tensor) -> torch.Tensor:
    """Padding of no rows changes nothing: one side holds on both."""
    n, rest = x.shape[0], x.shape[0] % 4
    if rest != 0:
        x = functional.pad(x, (0, 0, 0, 4 - rest))
    return x.reshape(-1, 4, 8).cumsum(1).reshape(-1, 8)[:n]


CASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "less": less,
    "conditional expression": conditional,
    "rounded up": rounded_up,
    "early returns": lambda x: first(x, early(x.shape[0])),
    "floats": float_compared,
    "stored": stored,
    "two numbers": lambda x: first(x, 1 if x.shape[0] < 10 else 2),
    "padded": padded,
    "jump": lambda x: first(x, 8 if x.shape[0] > 20 else x.shape[0]),
    "buckets": buckets,
}


@pytest.mark.parametrize(
    ("name", "length"), [*((name, 24) for name in CASES), ("less", 6), ("early returns", 6)]
)
def test_both_sides_of_a_branch_on_sizes_are_captured(name: str, length: int) -> None:
    captured = capture(Function(CASES[name]), (torch.randn(length, 8),))
    assert captured.program.graph.bounds["T"].intersect(Bounds(1)) == Bounds(1)
    for size in (1, 2, 3, 5, 7, 8, 9, 10, 12, 13, 16, 17, 20, 24, 29, 40, 41):
        x = torch.randn(size, 8)
        (ours,) = evaluate(captured.program.graph, (x,), captured.program.weights)
        assert torch.equal(ours, captured.eager(x)[0]), size


class Slots(nn.Module):
    """A gate as DeepSpeed writes it: the capacity, at least 3, is an axis of one-hot rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        capacity = x.shape[0] // 4
        if capacity < 3:
            capacity = 3
        scores = self.gate(x).softmax(-1)
        mask = functional.one_hot(scores.argmax(-1), 4)
        positions = (mask.cumsum(0) - 1) * mask
        mask = mask * (positions < capacity)
        slots = functional.one_hot((positions * mask).sum(-1), capacity).to(x.dtype)
        dispatch = torch.einsum("te,tc->tec", mask.to(x.dtype), slots)
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        results = torch.stack(
            [expert(part) for expert, part in zip(self.experts, rows, strict=True)]
        )
        combined = torch.einsum("tec,ecd->td", dispatch * scores[..., None], results)
        return combined + first(x, 1 if x.shape[0] < 10 else 2)


def test_a_least_capacity_is_a_block_that_compiled_code_has_at_every_length() -> None:
    module = Slots().eval()
    compiled = moec.compile(module, (torch.randn(24, 8),), verify=False)
    assert len(compiled.blocks) == 1
    for size in (1, 5, 9, 10, 11, 12, 13, 16, 30):
        for x in (torch.randn(size, 8), torch.randn(1, 8).expand(size, 8)):
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), module(x))


def test_sides_that_differ_in_more_than_sizes_limit_the_length() -> None:
    def other(x: torch.Tensor) -> torch.Tensor:
        return x.exp() if x.shape[0] > 8 else x.sin()

    for length, limits in ((24, Bounds(9)), (6, Bounds(1, 8))):
        captured = capture(Function(other), (torch.randn(length, 8),))
        assert captured.program.graph.bounds["T"].intersect(Bounds(1)) == limits


def test_a_branch_is_not_harmless_because_its_sides_meet() -> None:
    """Next to the threshold both sides give the same capacity; away from it they do not."""

    def clamped(x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        capacity = batch * length // 4
        if capacity < 4:
            capacity = 4
        if capacity > length:
            capacity = length
        return first(x.flatten(0, 1), capacity).view_as(x)

    captured = capture(Function(clamped), (torch.randn(2, 3, 8),))
    for batch, length in ((1, 1), (3, 2), (7, 3), (40, 3), (40, 1), (2, 4), (1, 30), (9, 7)):
        x = torch.randn(batch, length, 8)
        (ours,) = evaluate(captured.program.graph, (x,), captured.program.weights)
        assert torch.equal(ours, clamped(x)), (batch, length)


def test_a_guard_of_two_limits_is_tried_beyond_each() -> None:
    """Below the least capacity all rows are kept with any; beyond 64 rows they are not."""

    def bucketed(x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        capacities = (4, 8, 16, 64)
        capacity = (*capacities, 256)[bisect.bisect_left(capacities, batch * length)]
        return first(x.flatten(0, 1), capacity).view_as(x)

    captured = capture(Function(bucketed), (torch.randn(2, 6, 8),))
    for batch, length in (
        (1, 4),
        (1, 5),
        (2, 4),
        (3, 3),
        (4, 4),
        (1, 17),
        (8, 8),
        (5, 13),
        (3, 99),
    ):
        x = torch.randn(batch, length, 8)
        (ours,) = evaluate(captured.program.graph, (x,), captured.program.weights)
        assert torch.equal(ours, bucketed(x)), (batch, length)


def test_a_guard_is_no_cause_where_another_is_false_too() -> None:
    """torch compares 8*S with 8, to list rows by their place: at S = 1 and B = 2 there are also too
    few rows for the capacity of the other branch, which alone makes a difference."""

    def by_place(x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(0, 1).reshape(-1, 8)
        return first(rows, less_of(rows.shape[0])).view(x.shape[1], -1, 8).transpose(0, 1)

    def less_of(rows: int) -> int:
        capacity = rows * 3 // 8
        if capacity < 4:
            capacity = 4
        return capacity

    captured = capture(Function(by_place), (torch.randn(2, 6, 8),))
    for batch, length in ((1, 1), (2, 1), (1, 2), (10, 1), (1, 11), (3, 4), (40, 1), (5, 9)):
        x = torch.randn(batch, length, 8)
        (ours,) = evaluate(captured.program.graph, (x,), captured.program.weights)
        assert torch.equal(ours, by_place(x)), (batch, length)


def test_a_guard_that_is_a_cause_at_some_size_is_refused_before_others() -> None:
    graph = capture(Function(lambda x: x + 1), (torch.randn(2, 6, 8),)).program.graph
    b, s = symbol("B"), symbol("S")
    of_torch, branch = Guard(sympy.Ne(8 * s, 8)), Guard(b * s + b >= 10)

    def agree(sizes: Mapping[str, int]) -> bool:
        return sizes["B"] * (sizes["S"] + 1) >= 10

    with pytest.raises(CaptureError, match=r"holds only where B\*S \+ B >= 10"):
        settle("Few", graph, [of_torch, branch], {"B": 2, "S": 6}, agree)


def test_rows_that_data_choose_are_cut_on_both_sides_of_a_branch() -> None:
    """The sides differ in more than the capacity: a slice up to a number has a start, and the
    minimum of a number and a count has its operands in another order."""

    def copied(x: torch.Tensor) -> torch.Tensor:
        capacity = 4 if x.shape[0] <= 8 else max(4, x.shape[0] // 2)
        token = torch.where(x[:, 0] > 0)[0][:capacity]
        out = x.clone()
        out[token] = x[token] + 1
        return out

    captured = capture(Function(copied), (torch.randn(6, 3),))
    assert captured.other is not None
    pieces = captured.other()
    assert pieces.other is not None
    masked = pieces.other()
    assert masked.way == "masked"
    for form in (captured, pieces, masked):
        for size in (1, 4, 5, 8, 9, 10, 11, 30):
            for x in (torch.randn(size, 3), torch.ones(size, 3)):
                (ours,) = evaluate(form.program.graph, (x,), form.program.weights)
                assert torch.equal(ours, copied(x)), size


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "condition",
    [lambda x: x.shape[0] * x.shape[1] > 20, lambda x: x.shape[1] <= 8, lambda x: len(x) >= 3],
)
def test_the_example_has_its_side_where_it_is_exported_at_other_lengths(
    condition: Callable[[torch.Tensor], bool], batch: int
) -> None:
    """The mask is not read, so that the lengths of x are not its own: 4 and 12."""

    def chosen(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, out = x.flatten(0, 1), x.flatten(0, 1).clone()
        token = torch.where(rows[:, 0] > 0)[0]
        out[token] = rows[token] + 1
        return (out * 0.5 if condition(x) else out).view_as(x)

    def example(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, length, 8), torch.ones(batch, length)

    compiled = moec.compile(Function(chosen), example(batch, 6), target="null", verify="quick")
    run = interpreted(compiled)
    for size in ((1, 6), (1, 30), (2, 6), (4, 12), (3, 2))[: 5 if batch == 2 else 2]:
        inputs = example(*size)
        assert torch.equal(run(*inputs), chosen(*inputs)), size


class WithPrior(nn.Module):
    """Texts of the example are as long as there are experts, so that no axis may have this length;
    neither x alone nor x with the prior's columns has its side of the branch at 12."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        weights, ids = torch.topk(self.gate(rows).sigmoid(), 2)
        if len(rows) > 20:
            weights = weights * prior.repeat_interleave(x.shape[1], 0).gather(1, ids)
        out = torch.zeros_like(rows)
        for expert in range(6):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, rows[token] * weights[token, slot, None])
        return out.view_as(x)


def test_each_way_of_capture_takes_the_example() -> None:
    captured = capture(WithPrior(), (torch.randn(2, 6, 16), torch.randn(2, 6)))
    ways = list[str]()
    while True:
        ways.append(captured.way)
        evaluate(captured.program.graph, captured.example, captured.program.weights)
        if captured.other is None:
            break
        captured = captured.other()
    assert ways == ["traced", "speculated", "masked"]


def test_sides_that_each_hold_a_number_are_not_harmless_elsewhere() -> None:
    """Below 4 rows the numbers make no difference; beyond 20, where none is tried, they do."""
    graph = capture(Function(lambda x: x + 1), (torch.randn(2, 6, 8),)).program.graph
    quarter = sympy.floor(symbol("B") * symbol("S") / 4)
    sides = sympy.Or(*(sympy.Eq(quarter, number) for number in (1, 2, 3, 4)))
    with pytest.raises(CaptureError, match="the example's sizes decide"):
        settle("Sides", graph, [Guard(sides)], {"B": 2, "S": 6}, lambda sizes: True)


def test_the_guards_of_each_side_are_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settling runs module and graph at many sizes: 8 sides and what is merged of them cost as
    many runs."""
    programs: list[object] = []

    def counted(name: str, program: object, *rest: Any) -> Any:
        programs.append(program)
        return settled(name, program, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sides, "settled", counted)
    capture(Function(rounded_up), (torch.randn(22, 3),))
    assert len(programs) == len({id(program) for program in programs}) > 1


def test_a_guard_is_tried_at_its_edge() -> None:
    """Up to 64 rows, 64 places are as many as there are rows; from 101 on, they are too few."""
    graph = capture(Function(lambda x: x + 1), (torch.randn(2, 6, 8),)).program.graph
    guard = Guard(symbol("B") * symbol("S") > 100)
    rows = []

    def agree(sizes: Mapping[str, int]) -> bool:
        rows.append(sizes["B"] * sizes["S"])
        return rows[-1] <= 64

    limited = settle("Jump", graph, [guard], {"B": 11, "S": 10}, agree)
    assert limited.bounds["B*S"] == Bounds(101)
    assert max(rows) == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capacity_that_jumps_is_right_where_one_expert_has_all_rows(dtype: torch.dtype) -> None:
    def limited(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        tokens = rows.shape[0]
        capacity = 64 if tokens > 100 else tokens
        hot = functional.one_hot(rows[:, :4].argmax(-1), 4)
        position = ((hot.cumsum(0) - 1) * hot).sum(-1)
        return (rows * (position < capacity)[:, None]).view_as(x)

    captured = capture(Function(limited), (torch.randn(2, 6, 8, dtype=dtype),))
    assert captured.program.graph.bounds["S"].intersect(Bounds(1)) == Bounds(1)
    for batch, length in ((1, 1), (4, 20), (10, 10), (1, 101), (5, 40)):
        x = torch.randn(1, 1, 8, dtype=dtype).expand(batch, length, 8).contiguous()
        (ours,) = evaluate(captured.program.graph, (x,), captured.program.weights)
        assert torch.equal(ours, limited(x)), (batch, length)


def test_sides_with_equal_lengths_are_not_the_other_side_of_all() -> None:
    def square(x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        return first(x.flatten(0, 1), 6 if batch == length else 9).view_as(x)

    with pytest.raises(CaptureError, match="holds only where B != S"):
        capture(Function(square), (torch.randn(2, 6, 8),))


@torch.jit.script
def _capacity(scores: torch.Tensor, factor: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """As DeepSpeed computes it: in tensors of one number, in single precision."""
    capacity = torch.ceil((scores.shape[0] / scores.shape[1]) * factor).to(torch.int64)
    if capacity < least:
        capacity = least.to(torch.int64)
    return capacity


@pytest.mark.parametrize("length", [24, 6])
def test_a_scripted_capacity_in_tensors_has_both_sides(length: int) -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        scores = x[:, :4].softmax(-1)
        return first(x, _capacity(scores, torch.tensor(1.25), torch.tensor(4)))

    captured = capture(Function(gate), (torch.randn(length, 8),))
    assert captured.program.graph.bounds["T"].intersect(Bounds(1)) == Bounds(1)
    for size in (1, 4, 9, 12, 13, 16, 17, 33, 80):
        x = torch.randn(size, 8)
        (ours,) = evaluate(captured.program.graph, (x,), captured.program.weights)
        assert torch.equal(ours, gate(x)), size


def test_a_float_in_a_tensor_rounds_in_single_precision() -> None:
    """35 tokens, 6 experts and a factor of 1.2 are 8 in tensors, and 7 in Python."""
    sixth = Single(lambda counts: (counts / 6).astype(np.float32), symbol("tokens"), 35)
    factor = single_of(1.2, {})
    assert factor is not None
    product = combined(OPERATIONS["mul"], sixth, factor)
    assert product is not None
    eager = torch.ceil((35 / 6) * torch.tensor(1.2))
    assert np.ceil(product.at(np.array([35.0]))) == eager == 8 == math.ceil(35 / 6 * 1.2) + 1
    assert rounded_single(product, "ceil") is None


def test_a_capacity_that_no_division_gives_in_single_precision_is_refused() -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        return first(x, _capacity(x[:, :6], torch.tensor(1.2), torch.tensor(4)))

    with pytest.raises(CaptureError, match="rounds as no integer division"):
        capture(Function(gate), (torch.randn(24, 8),))


def test_another_side_is_captured_where_other_guards_hold() -> None:
    """At 128 rows exactly nothing is left over, and what is computed of the rest is another side
    again."""
    size = symbol("S")
    graph = capture(Function(lambda x: x + 1), (torch.randn(2, 6, 8),)).program
    limiting = Guard(sympy.Lt(size, 128))
    guards = (limiting, Guard(sympy.Ne(sympy.Mod(size, 4), 0)))
    example = (torch.randn(2, 6, 8),)
    (sizes,) = sides.sizes_beyond(graph, [limiting], guards, example, {"B": Bounds(2)})
    assert sizes["S"] == 129
