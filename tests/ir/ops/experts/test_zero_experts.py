"""moe.zero_experts: its reference against the paper's equations, and its errors."""

from __future__ import annotations

import pytest
import torch

from moec.errors import IRError
from moec.ir.graph import Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse

TEXT = """
graph main(x: f32[T, 4], ids: i64[T, 2], w: f32[T, 2]; mix: f32[2, 2, 4], v: f32[2, 4]) {
  size T in [0, inf]
  z: f32[T, 4] = moe.zero_experts(x, ids, w, mix, v)
    <first=3, kinds=("zero", "copy", "constant", "constant"), weighted=true, mixed=true, dtype=f32>
  return z
}"""


def test_each_kind_is_the_papers() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(8, 4), torch.rand(8, 2)
    mix, v = torch.randn(2, 2, 4), torch.randn(2, 4)
    ids = torch.tensor([[0, 1], [2, 3], [4, 0], [5, 0], [6, 5], [4, 6], [3, 7], [5, 4]])

    def expert(e: int, row: torch.Tensor) -> torch.Tensor:
        if e == 4:
            return row
        if e in (5, 6):
            a, b = (mix[e - 5] @ row).softmax(-1)
            return a * row + b * v[e - 5]
        return torch.zeros(4)

    expected = torch.stack(
        [
            sum(w[t, s] * expert(int(ids[t, s]), x[t]) for s in range(2))  # type: ignore[misc]
            for t in range(8)
        ]
    )
    (result,) = evaluate(parse(TEXT), [x, ids, w], {"mix": mix, "v": v})
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_what_was_not_chosen_is_not_multiplied() -> None:
    x = torch.full((2, 4), torch.inf)
    ids = torch.tensor([[0, 3], [2, 8]])
    weights = {"mix": torch.randn(2, 2, 4), "v": torch.full((2, 4), torch.nan)}
    (result,) = evaluate(parse(TEXT), [x, ids, torch.rand(2, 2)], weights)
    assert torch.equal(result, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"zero", "copy"', '"zero", "double"', "kinds are"),
        ("first=3", "first=-1", "ids begin at -1"),
        ("v: f32[2, 4]", "v: f32[3, 4]", "for 2 of x"),
        ("mix: f32[2, 2, 4]", "mix: f32[2, 4, 2]", "for 2 of x"),
        ("w: f32[T, 2]", "w: f32[T, 3]", "for ids"),
        ("x: f32[T, 4]", "x: f32[2*T, 4]", "tokens, T choices"),
        ("<first", "<added=true, first", "the input addend is missing"),
        (
            '"copy", "constant", "constant"',
            '"copy", "copy", "copy"',
            "has inputs that no attribute",
        ),
    ],
)
def test_refusals(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(IRError, match=message):
        verify(parse(TEXT.replace(old, new)), Stage.MOE)
