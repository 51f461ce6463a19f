"""An example of any size gives one graph, in which dependent dims are one size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from moec.capture import capture
from moec.capture.calls.call import ModuleCall
from moec.capture.calls.trials import Trials
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate
from moec.ir.sizes.dims import Bounds
from moec.ir.text import print_graph
from moec.oracle.tolerance import distance
from tests.capture.modules import WIDTH, Counts, Function, Moe

Tensors = tuple[torch.Tensor, ...]
VOCABULARY = 11


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def ids(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randint(VOCABULARY, shape, generator=generator)


class Embedded(nn.Module):
    """A function of a table [V, D], and of the tensors."""

    def __init__(self, function: Callable[..., torch.Tensor], rows: int = VOCABULARY) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(floats(rows, WIDTH))

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(self.table, *tensors)


def attend(table: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores of all heads, mask [B, 1 or heads, S, S]."""
    x = table[tokens].unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).transpose(1, 2)


def cross(table: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (table[target] @ table[source].mT).softmax(-1) @ table[source]


def mask(tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    batch, length = tokens.shape
    lower = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    return lower if dtype == torch.bool else torch.where(lower, 0.0, -1e4)


def batch_of(batch: int, length: int) -> dict[str, tuple[Callable[[], nn.Module], Tensors]]:
    """Each module with an example of [batch, length] rows or tokens."""
    x, tokens = floats(batch, length, WIDTH), ids(batch, length)
    images = floats(batch, 3, length + 3, 16)

    def flat(table: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return (x.flatten(0, 1) + table[tokens.flatten()]).view(x.shape)

    def convolved(weight: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, weight.view(2, 3, 2, 2), stride=2).flatten(2).mean(-1)

    return {
        "rows": (Moe, (floats(batch * length, WIDTH),)),
        "texts": (Moe, (x,)),
        "two inputs of one batch": (lambda: Embedded(flat), (x, tokens)),
        "bool mask": (lambda: Embedded(attend), (tokens, mask(tokens, torch.bool))),
        "float mask": (lambda: Embedded(attend), (tokens, mask(tokens, torch.float32))),
        "weights of rows": (lambda: Function(lambda x, w: x * w), (x, x[..., :1])),
        "source and target": (lambda: Embedded(cross), (tokens, ids(batch, length))),
        "a task for all": (
            lambda: Embedded(lambda table, x, task: x * table[task].squeeze(0)),
            (x, torch.tensor([1])),
        ),
        "a task for each": (
            lambda: Embedded(lambda table, x, task: x * table[task][:, None]),
            (x, ids(batch)),
        ),
        "square": (lambda: Function(lambda a, b: a @ b), (ids(length, length), ids(length, batch))),
        "images": (lambda: Embedded(convolved, 3), (images,)),
        "grey images": (
            lambda: Function(lambda x: F.avg_pool2d(x.expand(-1, 1, -1, -1), 2)),
            (images[:, :1],),
        ),
    }


SIZES = ((2, 16), (1, 8), (1, 1), (8, 8))


@pytest.mark.parametrize("name", batch_of(1, 1))
def test_an_example_of_any_size_gives_the_same_graph(name: str) -> None:
    texts = set()
    for size in SIZES:
        build, example = batch_of(*size)[name]
        model = build()
        captured = capture(model, example)
        texts.add(print_graph(captured.program.graph))
        for other in SIZES:
            _, tensors = batch_of(*other)[name]
            (result,) = evaluate(captured.program.graph, tensors, captured.program.weights)
            assert distance(result, captured.eager(*tensors)[0]) < 1e-5
    (text,) = texts
    assert "[1," not in text.splitlines()[0] or name in ("grey images", "a task for all")


def shapes(captured: Any) -> list[str]:
    return ["x".join(map(str, value.shape)) for value in captured.program.graph.inputs]


@pytest.mark.parametrize("size", [(2, 8), (1, 8), (1, 1)])
def test_what_the_module_runs_with_apart_is_two_sizes(size: tuple[int, int]) -> None:
    build, example = batch_of(*size)["source and target"]
    assert shapes(capture(build(), example)) == ["BxS", "BxS2"]


def test_a_length_that_a_table_has_is_not_taken_for_it() -> None:
    model = Embedded(lambda table, x: x + table[: x.shape[1]], rows=8)
    captured = capture(model, (floats(1, 8, WIDTH),))
    assert shapes(captured) == [f"BxSx{WIDTH}"]


@pytest.mark.parametrize(
    "attention",
    [
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=x.shape[1] > 1),
        lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.0, x.ndim > 1 and x.shape[1] > 1),
    ],
)
@pytest.mark.parametrize("size", [(2, 16), (1, 8), (2, 1), (1, 1)])
def test_attention_takes_a_condition_on_a_size(attention: Any, size: tuple[int, int]) -> None:
    captured = capture(Function(attention), (floats(*size, WIDTH),))
    assert captured.program.graph.bounds["S"] == Bounds(1)
    for tensors in ((floats(1, 1, WIDTH),), (floats(3, 5, WIDTH),)):
        (result,) = evaluate(captured.program.graph, tensors)
        assert distance(result, attention(*tensors)) < 1e-6


def branching(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[0] == 1 else x * 3


def test_an_axis_at_which_1_is_something_else_is_fixed() -> None:
    captured = capture(Function(branching), (floats(1, 1, WIDTH),))
    assert shapes(captured) == [f"1xTx{WIDTH}"]
    assert captured.fixed == ("x axis 0 is always 1",)
    captured = capture(Function(branching), (floats(2, 5, WIDTH),))
    assert captured.program.graph.bounds["B"] == Bounds(2)


def test_an_axis_that_eager_wants_at_1_is_fixed() -> None:
    def alone(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == 1, "one text at a time"
        return x[0] * 2

    captured = capture(Function(alone), (floats(1, 1, WIDTH),))
    assert shapes(captured) == [f"1xTx{WIDTH}"]
    axes = {0: Dim("texts"), 1: Dim.AUTO}
    with pytest.raises(CaptureError, match="texts is to vary, and the module runs only where"):
        capture(Function(alone), (floats(1, 1, WIDTH),), dynamic_shapes=(axes,))


def test_named_sizes_of_1_are_widened_together_within_their_limits() -> None:
    texts, length = Dim("texts", min=1, max=3), Dim("length", min=1, max=4)
    axes = {0: texts, 1: length}
    build, example = batch_of(1, 1)["two inputs of one batch"]
    captured = capture(build(), example, dynamic_shapes=(axes, axes))
    assert shapes(captured) == [f"textsxlengthx{WIDTH}", "textsxlength"]
    assert captured.program.graph.bounds == {"texts": Bounds(1, 3), "length": Bounds(1, 4)}


def skips_ones(table: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As transformers: eager leaves a mask of ones out, whatever its shape; a trace cannot."""
    x = table[tokens]
    if not torch.compiler.is_exporting() and bool(mask.all()):
        return x.cumsum(1)
    return (x * mask[..., None]).cumsum(1)


@pytest.mark.parametrize("size", [(2, 16), (1, 8), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_mask_of_ones_is_tried_with_a_token_masked(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    example = ids(*size), torch.ones(size, dtype=dtype)
    captured = capture(Embedded(skips_ones).eval(), example)
    tokens, mask = captured.program.graph.inputs
    assert tokens.shape == mask.shape
    padded = torch.ones(3, 5, dtype=dtype)
    padded[0, -2:] = 0
    other = ids(3, 5), padded
    program = captured.program
    (result,) = evaluate(program.graph, other, program.weights)
    (expected,) = captured.eager(*other)
    assert distance(result, expected) < 1e-6


def test_trials_leave_states_as_they_were() -> None:
    model = Counts()
    before = model.total.clone()
    assert Trials(ModuleCall(model, (floats(5, WIDTH),), {})).runs([floats(3, WIDTH)])
    assert torch.equal(model.total, before)


def test_a_module_with_a_state_takes_an_example_of_one_row() -> None:
    texts = {print_graph(capture(Counts(), (floats(n, WIDTH),)).program.graph) for n in (1, 5)}
    assert len(texts) == 1


class TwoHalves(nn.Module):
    """A view whose first size is 2, as a batch of 2 has, and whose last is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layer(x).view(2, x.shape[0] * x.shape[1], -1)
        return first * second.cos()


@pytest.mark.parametrize("size", [(2, 5), (1, 1), (4, 6)])
def test_a_size_that_a_view_has_too(size: tuple[int, int]) -> None:
    """torch fixes a batch of 2 then, and writes the open size with floors that hold at 4."""
    module = TwoHalves()
    program = capture(module, (torch.randn(*size, 6),)).program
    assert [str(dim) for dim in program.graph.inputs[0].shape] == ["B", "S", "6"]
    assert all(bounds.low <= 1 for bounds in program.graph.bounds.values())
    for other in ((1, 1), (2, 3), (3, 5), (5, 4)):
        x = torch.randn(*other, 6)
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, module(x))


class Pooled(nn.Module):
    """One text alone is pooled without its mask."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = x.sum(-1)
        if x.shape[0] > 1:
            scores = scores + mask
        return (scores.softmax(-1)[..., None] * x).sum(1)


def test_a_mask_that_one_text_does_not_read_has_its_length() -> None:
    x, mask = floats(1, 6, WIDTH), torch.zeros(1, 6)
    captured = capture(Pooled(), (x, mask))
    assert shapes(captured) == [f"1xTx{WIDTH}", "BxT"]
    for length in (1, 2, 9):
        x, mask = floats(1, length, WIDTH), floats(1, length)
        (result,) = evaluate(captured.program.graph, (x, mask), captured.program.weights)
        assert distance(result, Pooled()(x, mask)) < 1e-5
