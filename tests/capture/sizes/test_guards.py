"""An export's assumptions about sizes: symbolic, a bound, harmless, or refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

import moec
from moec.capture import capture
from moec.errors import CaptureError, InputError, IRError, UsageError, VerificationError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.sizes.dims import Bounds
from moec.ir.text import parse, print_graph
from moec.verify.check import check
from tests.capture.modules import Function
from tests.capture.sized import BOUNDED, REFUSED, RIGHT
from tests.capture.sizes.test_python_numbers import SIZES, Tied, at, x


@pytest.mark.parametrize("name", BOUNDED)
def test_an_inequality_of_one_size_limits_it(name: str) -> None:
    function, (low, high) = BOUNDED[name]
    captured = capture(Function(function), (x,))
    assert captured.program.graph.bounds == {"T": Bounds(low, high)}
    assert any("sized.py:" in note for note in captured.fixed)


def test_beyond_a_bound_the_compiled_model_refuses() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 8:
            return x * 2
        return x if x.sum() > 0 else x * 3  # decided by data: no graph of this side

    compiled = moec.compile(Function(scaled), (x,))
    assert torch.equal(compiled(x[:9]), x[:9] * 2)
    with pytest.raises(InputError, match=r"axis 0 of input 'x' is 8.*T at least 9"):
        compiled(x[:8])
    assert "T is at least 9: test_guards.py:" in str(compiled.report())


def equal_sizes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[0] == y.shape[0] else x * y.shape[0]


def equal_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.numel() == y.numel() else x * 3


def longer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[0] >= y.shape[0] else x * 3


def sum_of_sizes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[0] + y.shape[0] == 48 else x * 3


def same_half(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 if int(x.shape[0] * 0.5) == len(y) // 2 else x * 3


def other_operators(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[0] >= y.shape[0] else x + 1


@pytest.mark.parametrize("function", [longer, sum_of_sizes, same_half])
def test_sides_of_two_sizes_that_differ_in_a_number_are_one_graph(function: Any) -> None:
    captured = capture(Function(function), (x, torch.randn(24, 8)))
    for sizes in itertools.product((1, 7, 23, 24, 25, 41, 60), repeat=2):
        at(captured, *(torch.randn(size, 8) for size in sizes))


def test_sides_of_two_sizes_that_differ_in_operators_are_refused() -> None:
    with pytest.raises(CaptureError, match="the graph holds only where"):
        capture(Function(other_operators), (x, torch.randn(24, 8)))


@pytest.mark.parametrize("function", [equal_sizes, equal_products])
def test_sizes_that_are_equal_by_chance_are_required(function: Any) -> None:
    """The graph refuses other sizes."""
    captured = capture(Function(function), (x, torch.randn(24, 8)))
    at(captured, torch.randn(5, 8), torch.randn(5, 8))
    with pytest.raises(IRError, match="axis 0"):
        evaluate(captured.program.graph, (torch.randn(5, 8), torch.randn(6, 8)), {})


def test_a_condition_that_changes_nothing_is_dropped_and_noted() -> None:
    def chunked(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] % 2 == 0 else x + x

    captured = capture(Function(chunked), (x,))
    assert captured.program.graph.bounds == {"T": Bounds(0)}
    (note,) = captured.fixed
    assert note.startswith("the same where not Mod(T, 2) == 0, as was tried: test_guards.py:")


def decoded(x: torch.Tensor) -> torch.Tensor:
    """Few rows with other operations: the same."""
    return x * 2 if x.shape[0] > 8 else x + x


def kept(x: torch.Tensor) -> torch.Tensor:
    """All rows have a place, up to 300."""
    return x * 2 if x.shape[0] <= 16 else functional.pad(x[:300] * 2, (0, 0, 0, len(x[300:])))


def stepped(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] < 4:
        return x * 2
    return x + x if x.shape[0] < 40 else x * 3


OTHER_SIDES = {
    (decoded, 24): Bounds(0),
    (decoded, 6): Bounds(0),
    (kept, 24): Bounds(0),
    (kept, 6): Bounds(0, 16),
    (stepped, 24): Bounds(0, 39),
    (stepped, 80): Bounds(40),
}


@pytest.mark.parametrize(
    ("function", "length"), OTHER_SIDES, ids=lambda v: getattr(v, "__name__", v)
)
def test_an_inequality_is_no_bound_where_the_other_side_computes_the_same(
    function: Any, length: int
) -> None:
    captured = capture(Function(function), (torch.randn(length, 8),))
    limits = captured.program.graph.bounds["T"]
    assert limits == OTHER_SIDES[function, length]
    for size in filter(limits.contains, (*SIZES, 300, 301, 1200)):
        at(captured, torch.randn(size, 8))


def test_a_size_that_the_export_fixed_is_an_error() -> None:
    def looped(x: torch.Tensor) -> torch.Tensor:
        return x * sum(1 for _ in range(x.shape[0]))

    words = r'runs at 25 too\n.*test_guards.py(.|\n)*allow_fixed="x"'
    with pytest.raises(CaptureError, match=words):
        capture(Function(looped), (x,))
    for allowed in ("x", ["x"], True):
        captured = capture(Function(looped), (x,), allow_fixed=allowed)
        assert captured.fixed == ("x axis 0 is always 24",)
    shapes = {"x": None}
    assert capture(Function(looped), (x,), dynamic_shapes=shapes).fixed == captured.fixed
    with pytest.raises(UsageError, match="allow_fixed names y, but the inputs are x"):
        capture(Function(looped), (x,), allow_fixed="y")


class Patches(nn.Module):
    """A vision model: channels, size and positions are those of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.places = nn.Parameter(torch.randn(16, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.patch(images).flatten(2).mT + self.places


def test_sizes_that_the_weights_fix_need_no_permission() -> None:
    captured = capture(Patches(), (torch.randn(2, 3, 16, 16),))
    assert captured.fixed[0] == "images axis 1 is always 3"
    assert captured.program.graph.bounds["S1"] == Bounds(16, 19)


def test_bounds_that_were_asked_for_are_kept_within_those_of_guards() -> None:
    rows = Dim("rows", min=1, max=64)
    captured = capture(
        Function(lambda x: x * 2 if x.shape[0] < 100 else x),
        (x,),
        dynamic_shapes={"x": {0: rows}},
    )
    assert captured.program.graph.bounds == {"rows": Bounds(1, 64)}
    with pytest.raises(CaptureError, match="rows"):
        capture(
            Function(lambda x: x * 2 if x.shape[0] > 8 else x),
            (x,),
            dynamic_shapes={"x": {0: rows}},
        )


def test_the_captured_graph_is_no_excuse_for_itself() -> None:
    """A wrong graph agrees with itself where ties are broken otherwise than in eager."""
    captured = capture(Tied().eval(), (torch.randn(2, 24, 16),))
    graph = captured.program.graph
    ops = [
        replace(op, attrs={**op.attrs, "other": 6}) if op.name == "aten.lt.Scalar" else op
        for op in graph.ops
    ]
    wrong = Program(replace(graph, ops=tuple(ops)), captured.program.weights)

    def run(inputs: Any) -> Any:
        results = evaluate(wrong.graph, list(inputs.values()), wrong.weights)
        return {v.name: t for v, t in zip(wrong.graph.outputs, results, strict=True)}

    with pytest.raises(VerificationError, match="differs from eager"):
        check(replace(captured, program=wrong), run, ())


def exported(function: Any, *tensors: torch.Tensor) -> Any:
    axes = tuple({0: Dim.AUTO} for _ in tensors)
    return torch.export.export(Function(function), tensors, dynamic_shapes=axes, strict=False)


@pytest.mark.parametrize("saved", [False, True])
def test_the_guards_of_an_exported_program_bound_it(saved: bool, tmp_path: Path) -> None:
    source = exported(RIGHT["int(n*2.0/8)"], x)
    if saved:
        torch.export.save(source, tmp_path / "model.pt2")
        source = torch.export.load(tmp_path / "model.pt2")
    captured = capture(source, (x,))
    assert captured.program.graph.bounds == {"T": Bounds(24, 27)}
    assert captured.fixed[-1] == "T is from 24 to 27: a guard of the export"


def test_an_exported_program_whose_guards_are_no_bounds_is_refused() -> None:
    source = exported(REFUSED["odd or long"][0], x)
    with pytest.raises(CaptureError, match=r"exported program(.|\n)*Mod\(T, 5\) != 3"):
        capture(source, (x,))


def test_a_guard_of_an_exported_program_that_cannot_be_read_is_refused() -> None:
    source = exported(RIGHT["n%5"], x)
    source._guards_code = ["__import__('os').getpid() > L['tensors'][0].size()[0]"]
    with pytest.raises(CaptureError, match="a guard of the exported program cannot be read"):
        capture(source, (x,))


@pytest.mark.parametrize(
    "condition",
    [
        lambda b, s: b * s == 90_000,
        lambda b, s: b**2 + s > 10**10,
        lambda b, s: b > 10_000 * s,
        lambda b, s: b * s % 65_536 == 0,
    ],
)
def test_a_branch_on_several_sizes_far_from_the_example_is_refused(
    condition: Callable[[int, int], bool],
) -> None:
    """Some of these numbers of rows are never run: the condition alone is evaluated there."""

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * (0.5 if condition(*x.shape[:2]) else 1.0)

    with pytest.raises(CaptureError, match=r"test_guards.py:\d+ in (.|\n)*holds only where"):
        capture(Function(scaled), (torch.randn(2, 4, 8),))


def test_a_greatest_product_of_sizes_is_a_bound() -> None:
    scaled = Function(lambda x: x * (0.5 if x.shape[0] * x.shape[1] > 1000 else 1.0))
    captured = capture(scaled, (torch.randn(2, 4, 8),))
    assert captured.program.graph.bounds["B*S"] == Bounds(0, 1000)


def test_a_least_product_of_sizes_is_a_bound() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.flip(1) if 2 * x.shape[0] * x.shape[1] > 9 else x

    graph = capture(Function(function), (torch.randn(3, 5, 4),)).program.graph
    assert graph.bounds["B*S"] == Bounds(5)
    for batch, length in ((1, 5), (5, 1), (2, 3), (4, 9)):
        x = torch.randn(batch, length, 4)
        assert torch.equal(evaluate(graph, [x], {})[0], function(x))
    with pytest.raises(IRError, match=r"B\*S is outside of .*test_guards\.py:\d+ in function"):
        evaluate(graph, [torch.randn(1, 4, 4)], {})


@pytest.mark.parametrize(("most", "scale"), [(5000, 1), (100_000, 1), (1_000_000, 8)])
def test_a_branch_on_a_large_product_of_sizes_limits_it(
    most: int, scale: int, tmp_path: Path
) -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * (0.5 if x.shape[0] * x.shape[1] * scale > most else 1.0)

    compiled = moec.compile(Function(scaled), (torch.randn(2, 4, 8),), verify=False)
    compiled.save(tmp_path / "scaled.moec")
    count = most // scale
    for model in (compiled, moec.load(tmp_path / "scaled.moec")):
        within = torch.randn(count // 50, 50, 8)
        torch.testing.assert_close(model(within), within)
        with pytest.raises(
            InputError, match=rf"B\*S is {count + 50}, because axis 0 of .* gives B"
        ):
            model(torch.randn(count // 50 + 1, 50, 8))
    notes = compiled.report().notes
    assert any(note.startswith(f"B*S is from 0 to {count}: ") for note in notes)
    assert f"size {{B*S}} in [0, {count}]" in print_graph(compiled.graph)
    assert print_graph(parse(print_graph(compiled.graph))) == print_graph(compiled.graph)
