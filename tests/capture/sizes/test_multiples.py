"""Lengths of which the module takes multiples only: other lengths are refused at the door."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import moec
from moec.capture import capture
from moec.errors import InputError, IRError
from moec.ir.interpret.evaluate import evaluate
from moec.ir.sizes.dims import Bounds, symbol
from moec.ir.sizes.thresholds import allows, nearest_allowed
from moec.ir.text import parse, print_graph
from moec.runtime.checks import check_inputs
from moec.runtime.package import Function as Signature
from moec.runtime.package import Port
from moec.runtime.sizes.expressions import multiple_of
from moec.verify.cases import references
from tests.capture.modules import Function

x = torch.randn(2, 8, 8)


def asserted(x: Tensor) -> Tensor:
    assert x.shape[1] % 2 == 0
    return x * 2


def raised(x: Tensor) -> Tensor:
    if x.shape[1] % 4:
        raise ValueError("windows of 4")
    return x * 2


def windows(x: Tensor) -> Tensor:
    b, n, d = x.shape
    return x.view(b, n // 4, 4, d).mean(2)


def unfolded(x: Tensor) -> Tensor:
    b, n, d = x.shape
    means = x.unfold(1, 4, 4).mean(-1)
    return x + means[:, :, None].expand(b, n // 4, 4, d).reshape(b, n, d)


def halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return first * second


def pairs(x: Tensor) -> Tensor:
    return x[:, 0::2] * x[:, 1::2]


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, 4, 8).mean(1)


MULTIPLES = {
    asserted: "Mod(S, 2)",
    raised: "Mod(S, 4)",
    windows: "Mod(S, 4)",
    unfolded: "Mod(S, 4)",
    halves: "Mod(S, 2)",
    pairs: "Mod(S, 2)",
    rows: "Mod(B*S, 4)",
}


@pytest.mark.parametrize("function", MULTIPLES, ids=lambda f: f.__name__)
def test_a_length_at_which_the_module_fails_is_outside_of_the_bounds(function: Any) -> None:
    captured = capture(Function(function), (x,))
    graph, remainder = captured.program.graph, MULTIPLES[function]
    assert graph.bounds[remainder] == Bounds(0, 0)
    assert any(re.search(r"a multiple of \d: test_multiples.py:\d+", n) for n in captured.fixed)
    for batch in (1, 2, 3, 4):
        for length in (*range(4, 13), 36):
            sizes, tensor = {"B": batch, "S": length}, torch.randn(batch, length, 8)
            if allows(graph.bounds, sizes):
                (actual,) = evaluate(graph, (tensor,), captured.program.weights)
                assert torch.equal(actual, function(tensor))
                continue
            with pytest.raises((AssertionError, RuntimeError, ValueError)):
                function(tensor)
            with pytest.raises(IRError, match=r"outside of \[0, 0\].*test_multiples.py:\d+"):
                evaluate(graph, (tensor,), captured.program.weights)


def test_both_sides_of_a_picture_are_multiples_of_the_window() -> None:
    def swin(x: Tensor) -> Tensor:
        b, height, width, d = x.shape
        return x.view(b, height // 4, 4, width // 4, 4, d).mean((2, 4))

    axes = {"x": {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}}
    bounds = capture(
        Function(swin), (torch.randn(2, 8, 12, 4),), dynamic_shapes=axes
    ).program.graph.bounds
    remainders = {name for name in bounds if not name.isidentifier()}
    assert len(remainders) == 2
    assert all(name.endswith(", 4)") for name in remainders)


def test_a_branch_that_runs_at_other_lengths_makes_no_multiple() -> None:
    def padded(x: Tensor) -> Tensor:
        missing = (4 - x.shape[1] % 4) % 4
        return nn.functional.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, 4)).mean(2)

    bounds = capture(Function(padded), (x,)).program.graph.bounds
    assert bounds.keys() == {"B", "S"}


def test_a_multiple_is_part_of_the_text() -> None:
    graph = capture(Function(raised), (x,)).program.graph
    text = print_graph(graph)
    assert "size {Mod(S, 4)} in [0, 0]" in text
    assert print_graph(parse(text)) == text
    assert parse(text).bounds == graph.bounds


def test_sizes_that_are_tried_are_multiples_on_both_sides_of_the_example() -> None:
    captured = capture(Function(raised), (x,))
    answers, _ = references(captured)
    lengths = {case[0].shape[1] for case, _ in answers}
    assert {4, 8, 12, 20} <= lengths
    assert all(length % 4 == 0 for length in lengths)


def test_the_nearest_allowed_sizes_are_found_in_both_directions() -> None:
    bounds = {"B": Bounds(1, 3), "S": Bounds(), "Mod(B*S, 4)": Bounds(0, 0)}
    assert nearest_allowed(bounds, {"B": 3, "S": 7}) == {"B": 3, "S": 8}
    assert nearest_allowed(bounds, {"B": 3, "S": 7}, -1) == {"B": 3, "S": 4}
    assert nearest_allowed({"S": Bounds()}, {"S": 7}) == {"S": 7}
    never = {"S": Bounds(5, 7), "Mod(S, 4)": Bounds(0, 0)}
    assert nearest_allowed(never, {"S": 6}) == {"S": 6}


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("Mod(S, 4)", "S must be a multiple of 4, and axis 0 of 'x' gives S = 7 (model.py:3)"),
        ("Mod(S + 2, 4)", "S + 2 must be a multiple of 4, and axis 0 of 'x' gives S = 7"),
        ("2*S", "2*S is 14, because axis 0 of 'x' gives S = 7, and the model was compiled for"),
    ],
)
def test_the_door_names_the_multiple_and_the_line(size: str, words: str) -> None:
    inputs = (Port("x", "f32", ("S",)),)
    sizes = {"S": (0, None), size: (0, 0)}
    function = Signature(inputs, sizes=sizes, causes={"Mod(S, 4)": "model.py:3"})
    with pytest.raises(InputError, match=re.escape(words)):
        check_inputs(function, {"x": torch.zeros(7)})


def test_a_remainder_is_read_of_its_text() -> None:
    assert multiple_of("Mod(B*S, 4)") == ("B*S", 4)
    assert multiple_of("B*S") is None
    assert multiple_of(str(symbol("S") % 3)) == ("S", 3)


def test_the_artifact_refuses_what_the_model_refuses(tmp_path: Path) -> None:
    compiled = moec.compile(Function(windows), (x,))
    assert "S a multiple of 4" in str(compiled.report())
    compiled.save(tmp_path / "m.moec")
    for model in (compiled, moec.load(tmp_path / "m.moec")):
        torch.testing.assert_close(model(torch.ones(3, 12, 8)), torch.ones(3, 3, 8))
        with pytest.raises(InputError, match=r"S must be a multiple of 4, .*test_multiples\.py"):
            model(torch.ones(2, 7, 8))


def test_an_exported_program_has_the_multiples_of_its_guards() -> None:
    exported = torch.export.export(Function(raised), (x,), dynamic_shapes={"x": {1: Dim.DYNAMIC}})
    bounds = capture(exported).program.graph.bounds
    assert any(name.startswith("Mod(") and name.endswith(", 4)") for name in bounds)
