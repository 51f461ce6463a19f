"""MoE++ layers in a user's module: recognised with routers and gating residuals, and correct."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from tests.passes import zero_forms as forms

Golden = Callable[[str], None]
ZERO = {"Layer": "2 constant, 1 copy, 1 zero", "OnlyZero": "1 zero"}
ZERO["Dense"] = ZERO["Evaluated"] = ZERO["Layer"]


@pytest.mark.parametrize("kind", ZERO)
def test_three_layers_with_gating_residuals(kind: str, golden: Golden) -> None:
    torch.manual_seed(1)
    model = forms.Stack(getattr(forms, kind)).eval()
    compiled = moec.compile(model, (torch.randn(7, forms.D),), verify=1e-5)
    blocks = compiled.blocks
    assert [(b.experts, b.top_k, b.zero) for b in blocks] == [(4, 2, ZERO[kind])] * 3
    assert all(b.router.startswith("softmax, top-2") for b in blocks)
    assert {d.rule for d in compiled.declined} == {"fuse-gate"}
    for tokens in (0, 1, 64):
        x = torch.randn(tokens, forms.D)
        # Three layers in float32, sums in another order.
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    if kind == "Layer":
        graph = compiled.pass_results[-1].program.graph
        assert print_graph(parse(print_graph(graph))) == print_graph(graph)
        golden(print_graph(graph))


def test_no_row_is_dispatched_for_them() -> None:
    """All tokens choose experts without a network: the grouped products own no row."""
    torch.manual_seed(2)
    layer = forms.Layer(k=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[4:7] = torch.rand(3, forms.D)
    compiled = moec.compile(layer.eval(), (torch.rand(5, forms.D),), verify=False)
    (sort,) = [op for op in compiled.pass_results[-1].program.graph.ops if op.name == "moe.sort"]
    assert sort.attrs["num_experts"] == 4
    x = torch.rand(9, forms.D)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-5, atol=1e-6)


class Constant(forms.Constant):
    """The shares as scalars of each row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha = self.mix(x).softmax(-1)
        fixed = torch.einsum("b,d->bd", alpha[:, 1], self.vector)
        return torch.einsum("b,bd->bd", alpha[:, 0], x) + fixed


class Masks(forms.Layer):
    """Each expert's rows are those of a mask with one row for each expert."""

    order = (forms.Copy, Constant, Constant, forms.Zero)

    def mixed(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out, count = torch.zeros_like(x), len(self.experts)
        masks = torch.nn.functional.one_hot(ids, count).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slots, tokens = torch.where(masks[number])
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


def test_rows_of_masks_and_constants_by_einsums() -> None:
    torch.manual_seed(1)
    layer = Masks().eval()
    compiled = moec.compile(layer, (torch.randn(7, forms.D),), build=False)
    assert [(b.experts, b.top_k, b.zero) for b in compiled.blocks] == [(4, 2, ZERO["Layer"])]
    program, x = compiled.pass_results[-1].program, torch.randn(23, forms.D)
    with torch.no_grad():
        for result, expected in zip(
            evaluate(program.graph, [x], program.weights), layer(x), strict=True
        ):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


class Biased(forms.Layer):
    """The constants' mix has a bias: no constant of MoE++."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            if isinstance(expert, forms.Constant):
                expert.mix = torch.nn.Linear(forms.D, 2)


class Swapped(forms.Layer):
    """The constants' shares are in the other order."""

    class Constant(forms.Constant):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            alpha = self.mix(x).softmax(-1)
            return alpha[:, 1:] * x + alpha[:, :1] * self.vector

    order = (forms.Copy, Constant, Constant, forms.Zero)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            Biased,
            "only 4 of the 7 experts that the router chooses among are alike: a constant has "
            "weights [2, D] and [D], an expert of its kind",
        ),
        (Swapped, "static loop: the numbers differ by"),
    ],
)
def test_refusals(layer: type[forms.Layer], reason: str) -> None:
    torch.manual_seed(3)
    compiled = moec.compile(layer().eval(), (torch.randn(5, forms.D),), build=False)
    assert compiled.blocks == ()
    assert any(d.reason.startswith(reason) for d in compiled.declined), compiled.declined
