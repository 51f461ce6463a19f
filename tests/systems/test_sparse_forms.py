"""The sparse baselines of benchmarks/systems/sparse.py have the results of the examples' dense
layers, whatever the router chooses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.systems.sparse import FORMS, sparse
from tests.systems.records import load

TOLERANCE = 1e-5
"""float32: both forms add the same products, at most 64 per value, in an order that depends on the
number of rows, and the results of at most 3 experts in any order. That is at most 67 roundings of
6e-8 of values near 1 in each of two layers, 8e-6 in all."""
WIDTH = 16
EXPERTS = 6
Layer = tuple[nn.Module, Callable[[int], tuple[Tensor, ...]]]
"""A dense layer, and its inputs for a number of rows."""


def rows(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, WIDTH),)


def batch(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(1, count, WIDTH),)


def se_moe(gate: str) -> Layer:
    example = load("09_se_moe")
    sizes = example.Sizes(width=WIDTH, hidden=64, experts=EXPERTS, gate=gate)
    return example.Experts(sizes), rows


def multimodal_generative() -> Layer:
    example = load("10_multimodal_generative")
    return example.Sparse(example.Sizes(width=WIDTH, hidden=64, experts=EXPERTS)), batch


def m3_jepa() -> Layer:
    return load("11_m3_jepa").Experts(WIDTH, EXPERTS, 3), rows


def raphael() -> Layer:
    def inputs(count: int) -> tuple[Tensor, ...]:
        attention = torch.randn(2, count, 9).softmax(1)
        return torch.randn(2, 9, WIDTH), torch.randn(2, count, 8), attention

    return load("12_raphael").SpaceMoE(WIDTH, 8, EXPERTS, alpha=0.2), inputs


def zcode_m3(factor: float | None) -> Layer:
    example = load("14_zcode_m3")
    sizes = example.Sizes(width=WIDTH, hidden=64, experts=EXPERTS, factor=factor, least=1)

    def inputs(count: int) -> tuple[Tensor, ...]:
        return torch.randn(count, WIDTH), torch.rand(count, EXPERTS)

    return example.Switch(sizes), inputs


def gemini_to_qstar() -> Layer:
    example = load("15_gemini_to_qstar")
    return example.Sparse(example.Sizes(width=WIDTH, hidden=64, experts=EXPERTS)), rows


def fastdit_3d() -> Layer:
    """A block: the dense layer is a part of it."""
    example = load("16_fastdit_3d")
    sizes = example.Sizes(width=WIDTH, heads=2, experts=EXPERTS)

    def inputs(count: int) -> tuple[Tensor, ...]:
        return torch.randn(1, count, WIDTH), torch.randn(1, WIDTH)

    return example.Block(sizes, example.SparseFFN(sizes)), inputs


CASES: dict[str, tuple[str, int, Callable[[], Layer]]] = {
    "switch": ("09_se_moe", 1, lambda: se_moe("switch")),
    "gshard": ("09_se_moe", 2, lambda: se_moe("gshard")),
    "multimodal generative": ("10_multimodal_generative", 2, multimodal_generative),
    "m3 jepa": ("11_m3_jepa", 3, m3_jepa),
    "raphael": ("12_raphael", 2, raphael),
    "zcode m3, no capacity": ("14_zcode_m3", 1, lambda: zcode_m3(None)),
    "zcode m3, capacity": ("14_zcode_m3", 1, lambda: zcode_m3(1.0)),
    "gemini to qstar": ("15_gemini_to_qstar", 1, gemini_to_qstar),
    "fastdit 3d": ("16_fastdit_3d", 2, fastdit_3d),
}
"""Each example, the choices per row of its inputs (RAPHAEL's rows are words, in two texts), and the
layer."""


def test_each_form_has_a_case() -> None:
    assert {name for name, _, _ in CASES.values()} == set(FORMS)


def test_other_examples_have_none() -> None:
    assert sparse("01_momentum_smoe", nn.Identity()) is None


def count_rows(module: nn.Module) -> list[int]:
    """The rows of each call of an expert, filled by the calls."""
    counts: list[int] = []
    (experts,) = (part.experts for part in module.modules() if hasattr(part, "experts"))
    for expert in experts:
        expert.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[0]))
    return counts


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("case", CASES)
def test_the_results_of_the_dense_layer_from_fewer_rows(case: str, count: int) -> None:
    """One row leaves experts without any."""
    name, choices, build = CASES[case]
    torch.manual_seed(count)
    module, inputs = build()
    rewritten = sparse(name, module.eval())
    assert rewritten is not None
    counts = count_rows(rewritten)
    for _ in range(5):
        drawn = inputs(count)
        counts.clear()
        with torch.no_grad():
            results, expected = rewritten(*drawn), module(*drawn)
        torch.testing.assert_close(results, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert len(counts) == EXPERTS
        assert sum(counts) <= choices * count
        assert 0 in counts or count > 1


def test_weights_are_shared() -> None:
    module, _ = fastdit_3d()
    rewritten = sparse("16_fastdit_3d", module)
    assert rewritten is not None
    shared = zip(module.parameters(), rewritten.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in shared)
