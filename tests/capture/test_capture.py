"""The result of a capture: sizes, names, weights, and refusals with their reasons."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

from moec.capture import capture
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate
from moec.ir.sizes.dims import Bounds
from tests.capture.modules import WIDTH, Function, Moe, Tied, Two

x, y = torch.randn(5, WIDTH), torch.randn(5, WIDTH)


def shapes(captured: Any) -> dict[str, tuple[str, ...]]:
    return {v.name: tuple(map(str, v.shape)) for v in captured.program.graph.inputs}


def test_one_free_axis_is_t() -> None:
    captured = capture(Moe(), (x,))
    assert shapes(captured) == {"x": ("T", "8")}
    assert captured.program.graph.bounds == {"T": Bounds(0)}
    assert [v.name for v in captured.program.graph.outputs] == ["output"]


def test_two_free_axes_are_b_and_s_of_ids() -> None:
    captured = capture(Tied(), (torch.tensor([[1, 2, 3], [4, 5, 6]]),))
    assert shapes(captured) == {"ids": ("B", "S")}


@pytest.mark.parametrize(
    "wish",
    [
        {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}},
        ({0: Dim.AUTO}, {0: Dim.AUTO}),
        ([Dim.AUTO, None], [Dim.AUTO, None]),
    ],
)
def test_dynamic_shapes_by_name_and_by_place(wish: Any) -> None:
    captured = capture(Two(), (x, y), dynamic_shapes=wish)
    sizes = shapes(captured)
    assert sizes["x"] == sizes["y"] == ("T", "8")


def test_named_dims_keep_their_names_and_bounds() -> None:
    rows = Dim("rows", min=1, max=64)
    captured = capture(Two(), (x, y), dynamic_shapes={"x": {0: rows}, "y": {0: rows}})
    assert shapes(captured)["x"] == ("rows", "8")
    assert captured.program.graph.bounds == {"rows": Bounds(1, 64)}


def test_what_is_not_named_is_fixed_and_said() -> None:
    captured = capture(Two(), (x, y), dynamic_shapes={"x": None, "y": None})
    assert shapes(captured) == {"x": ("5", "8"), "y": ("5", "8")}
    assert captured.fixed == ("x axis 0 is always 5", "y axis 0 is always 5")


def test_a_size_that_the_model_fixes_is_said() -> None:
    captured = capture(Function(lambda x: x + torch.ones(5, WIDTH)), (x,))
    assert captured.fixed == ("x axis 0 is always 5",)


def causal(x: torch.Tensor) -> torch.Tensor:
    """As transformers does: no mask for one row, which leads the export to two at least."""
    scores = x @ x.T
    if x.shape[0] > 1:
        scores = scores + torch.full_like(scores, -1e4).triu(1)
    return scores.softmax(-1) @ x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lower_bound_of_two_is_lowered_where_one_works(dtype: torch.dtype) -> None:
    captured = capture(Function(causal), (x.to(dtype),))
    assert captured.program.graph.bounds == {"T": Bounds(1)}


def test_a_lower_bound_that_was_asked_for_stands() -> None:
    rows = Dim("rows", min=2)
    captured = capture(Function(causal), (x,), dynamic_shapes=({0: rows},))
    assert captured.program.graph.bounds == {"rows": Bounds(2)}


def test_a_lower_bound_stands_where_one_row_gives_something_else() -> None:
    captured = capture(Function(lambda x: x * 2 if x.shape[0] > 1 else x * 3), (x,))
    assert captured.program.graph.bounds == {"T": Bounds(2)}


def test_a_lower_bound_that_the_model_needs_stands() -> None:
    def needs_two(x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[0] >= 2)
        return x[1] + x

    captured = capture(Function(needs_two), (x,))
    assert captured.program.graph.bounds["T"].low == 2


def test_tied_weights_are_one() -> None:
    model = Tied()
    captured = capture(model, (torch.tensor([[1, 2, 3], [4, 5, 6]]),))
    (name,) = captured.program.weights
    assert name in ("embedding.weight", "head.weight")
    assert captured.program.weights[name].data_ptr() == model.head.weight.data_ptr()


def test_weights_keep_their_names_and_memory() -> None:
    model = Moe()
    captured = capture(model, (x,))
    remaining = dict(model.named_parameters())
    assert captured.program.weights.keys() == remaining.keys()
    for name, weight in captured.program.weights.items():
        assert weight.data_ptr() == remaining[name].data_ptr()


def test_mapped_safetensors_stay_mapped(tmp_path: Path) -> None:
    """The weights of the capture are in the mapped file, not in separate memory."""
    from safetensors import safe_open

    save_file({"weight": torch.randn(WIDTH, WIDTH), "bias": torch.randn(WIDTH)}, tmp_path / "w")
    model = nn.Linear(WIDTH, WIDTH)
    with safe_open(tmp_path / "w", "pt") as file:
        mapped = {name: file.get_tensor(name) for name in file.keys()}
    model.load_state_dict(mapped, assign=True)
    captured = capture(model, (x,))
    for name, weight in captured.program.weights.items():
        assert weight.data_ptr() == mapped[name].data_ptr()


def test_a_number_among_the_inputs_is_fixed() -> None:
    captured = capture(Function(lambda x, scale: x * scale), (x, 3))
    assert shapes(captured) == {"x": ("T", "8")}
    (result,) = evaluate(captured.program.graph, (y,), captured.program.weights)
    assert torch.equal(result, y * 3)


def test_a_module_that_casts_its_part_in_forward() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.part = self.part.to(torch.float32)
            return self.part(x)

    model = Casts()
    captured = capture(model, (x,))
    (result,) = evaluate(captured.program.graph, (y,), captured.program.weights)
    assert torch.allclose(result, model(y))


def writes_into_its_input(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1) * 2


def branches(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def depends_on_data(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize(
    ("function", "inputs", "words"),
    [
        (writes_into_its_input, x, "writes into its input x; copy the input first, or make it"),
        (branches, x, "control flow (cond) cannot be compiled; write it with torch.where"),
        (depends_on_data, x, "if x.sum() > 0 else x - 1` was taken to be True\n  eager differs by"),
        (lambda x: x.to(torch.float8_e4m3fn), x, "moec has no dtype torch.float8_e4m3fn; cast"),
        (lambda x: x / "text", x, 'lambda x: x / "text"'),
        (
            lambda x: nn.functional.elu(x, alpha=x.shape[0] / 4),
            x,
            "depends on a size or on data, and is an argument that a graph stores as a constant; ",
        ),
        (lambda x: x, torch.empty(5, WIDTH, device="meta"), "input x has no data"),
    ],
)
def test_refusals(function: Callable[..., Any], inputs: Any, words: str) -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Function(function), (inputs,))
    assert words in str(raised.value)


def test_a_size_may_be_made_from_a_float() -> None:
    model = Function(lambda x: (x.cumsum(0) < math.ceil(0.75 * x.shape[0])) * x)
    captured = capture(model, (x,))
    (op,) = [op for op in captured.program.graph.ops if op.name == "aten.lt.Scalar"]
    assert str(op.attrs["other"]) == "ceiling(3*T/4)"
    for rows in (1, 3, 8):
        tokens = torch.rand(rows, WIDTH)
        (actual,) = evaluate(captured.program.graph, [tokens], captured.program.weights)
        assert torch.equal(actual, model(tokens))


def test_weights_without_data_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"experts\.0\.weight has no data .*load the weights"):
        capture(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2, device="meta")])}), ())


def test_arguments_that_the_module_does_not_take() -> None:
    with pytest.raises(CaptureError, match=r"Two.forward: missing a required argument: 'y'"):
        capture(Two(), (x,))
    with pytest.raises(CaptureError, match=r"Two.forward: got an unexpected keyword argument 'z'"):
        capture(Two(), (x, y), {"z": x})


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"z": {0: Dim.AUTO}}, "dynamic_shapes names z, but the arguments are x, y"),
        (({0: Dim.AUTO},), "dynamic_shapes has 1 entries for the arguments x, y"),
        ({"x": {2: Dim.AUTO}}, "dynamic_shapes: x has 2 axes, but axis 2 is named"),
    ],
)
def test_wishes_that_do_not_fit(wish: Any, words: str) -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Two(), (x, y), dynamic_shapes=wish)
    assert words in str(raised.value)
