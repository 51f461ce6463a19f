"""Forms of dispatch that torch.export refuses are captured unmodified, and equal eager."""

from __future__ import annotations

import math

import pytest
import torch

import moec
from moec.capture import capture
from moec.codegen.backends import backend_for
from moec.codegen.lower import supported
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate
from tests.capture.speculate import capacities, forms, maps, offsets, repairs
from tests.capture.speculate.layer import D, E, Form, Layer, forms_of

SIZES = ((2, 6), (1, 1), (3, 5), (1, 9), (4, 20))


def inputs(size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, D, generator=torch.Generator().manual_seed(seed))


FILES = (forms, capacities, offsets, repairs, maps)
EVERY_FORM = {name: form for file in FILES for name, form in forms_of(file).items()}


@pytest.mark.parametrize("form", EVERY_FORM.values(), ids=EVERY_FORM)
def test_a_form_is_captured_for_all_sizes(form: Form) -> None:
    """The graph does what eager does, in the order in which it does it: float32 sums of two rows
    in another order differ by one unit in the last place."""
    layer = Layer(form).eval()
    captured = capture(layer, (inputs((2, 6)),))
    for size in SIZES:
        for x in (inputs(size, 2), inputs((1, 1)).expand(*size, D).contiguous()):
            (actual,) = evaluate(captured.program.graph, [x], captured.program.weights)
            with torch.no_grad():
                expected = layer(x)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


RECOGNISED = (
    "counts as a list",
    "a count as a truth",
    "numpy ends",
    "split and cat",
    "a function of its own",
    "capacity of a float",
    "rows of the total",
    "a buffer of the total",
)


@pytest.mark.parametrize(
    "name",
    [
        "slices between tensors",
        "marks that are counted",
        "selects of copies",
        "rows padded by none",
    ],
)
def test_pieces_of_sorted_rows_are_a_block(name: str) -> None:
    layer = Layer(EVERY_FORM[name]).eval()
    compiled = moec.compile(layer, (inputs((2, 6)),), build=False)
    assert compiled.captured.way == "speculated"
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, 2)]


def test_products_on_sorted_rows_are_a_block() -> None:
    """Rows that stay sorted are pieces of a split, not the rows of each class. The second result
    keeps the layer from being observed."""

    def with_cosine(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = EVERY_FORM["two products on sorted rows"](layer, x)
        return y, y.cos()

    compiled = moec.compile(Layer(with_cosine).eval(), (inputs((2, 6)),), build=False)
    assert compiled.captured.way == "speculated"
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, 2)]


@pytest.mark.parametrize("name", ["a map that a capacity cuts", "slots within a capacity"])
def test_rows_within_a_capacity_have_kernels(name: str) -> None:
    """Tokens that are all alike are beyond every capacity."""
    layer = Layer(EVERY_FORM[name]).eval()
    compiled = moec.compile(layer, (inputs((2, 6)),), build=False)
    program = compiled.pass_results[-1].program
    assert supported(program.graph, backend_for(compiled.target))
    for size in SIZES:
        for x in (inputs(size, 2), inputs((1, 1)).expand(*size, D).contiguous()):
            (result,) = evaluate(program.graph, [x], program.weights)
            with torch.no_grad():
                torch.testing.assert_close(result, layer(x), rtol=1e-4, atol=1e-5)


def test_rows_of_a_map_are_a_block() -> None:
    layer = Layer(EVERY_FORM["rows that a map selects"]).eval()
    compiled = moec.compile(layer, (inputs((2, 6)),), build=False)
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, 2)]


def test_an_axis_that_the_export_fixed_is_refused() -> None:
    def scaled(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        return layer.dense(x.reshape(-1, D)).view_as(x) * math.lgamma(x.shape[1])

    with pytest.raises(CaptureError, match=r"axis 1 of x would always be .*, and the module runs"):
        capture(Layer(scaled).eval(), (inputs((2, 6)),))


class ChosenOutside(Layer):
    """The choice is an input: an expert for each text."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        order = ids.argsort(stable=True)
        parts = x.index_select(0, order).split(torch.bincount(ids, minlength=E).tolist())
        y = torch.vstack([self.experts[e](parts[e]) for e in range(E) if parts[e].size(0) > 0])
        return y.index_select(0, order.argsort())


def test_ids_from_outside_are_counted_for_the_classes_that_are_asked_for() -> None:
    layer = ChosenOutside(lambda layer, x: x).eval()
    captured = capture(layer, (inputs((3, 6)), torch.tensor([0, 3, 1])))
    for ids in (torch.tensor([2]), torch.tensor([3, 3, 0, 1, 3])):
        x = inputs((len(ids), 4), 2)
        (y,) = evaluate(captured.program.graph, [x, ids], captured.program.weights)
        with torch.no_grad():
            torch.testing.assert_close(y, layer(x, ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_form_is_compiled_with_its_block(name: str) -> None:
    layer = Layer(EVERY_FORM[name]).eval()
    compiled = moec.compile(layer, (inputs((2, 6)),))
    assert len(compiled.blocks) == 1
    for size in SIZES[1:3]:
        x = inputs(size, 3)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_other_form_masks_rows() -> None:
    """None of its sizes depends on data, and its notes list the assumptions and their cost."""
    layer = Layer(capacities.capacity_compared).eval()
    captured = capture(layer, (inputs((2, 6)),))
    assert captured.other is not None
    form = captured.other()
    assert "aten.nonzero.default" not in {op.name for op in form.program.graph.ops}
    notes = " ".join(form.fixed)
    assert "every row is computed, and masked" in notes
    assert "capacities.py" in notes
    assert "`if len(rows) > capacity:` as True" in notes
    for size in SIZES:
        x = inputs(size, 3)
        (actual,) = evaluate(form.program.graph, [x], form.program.weights)
        with torch.no_grad():
            torch.testing.assert_close(actual, layer(x), rtol=1e-5, atol=1e-6)


class Jump(torch.nn.Module):
    """Chooses one expert for each of more than 20 tokens, else two."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(D, E, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, share = (2, 1.0) if x.shape[0] <= 20 else (1, 0.5)
        weights, ids = self.router(x).softmax(-1).topk(k, -1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == index)
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None] * share)
        return y


def test_the_masked_form_has_the_guards_of_the_form_that_it_comes_from() -> None:
    """Its own export is of a graph in which k is a number: it has no guards."""
    forms = [capture(Jump().eval(), (torch.randn(6, D),))]
    while forms[-1].other is not None:
        forms.append(forms[-1].other())
    assert [form.way for form in forms] == ["traced", "speculated", "masked"]
    assert [form.program.graph.bounds["T"].high for form in forms] == [20, 20, 20]
