"""Single operators of PyTorch, on torch's own samples."""

from __future__ import annotations

import pytest
import torch

from moec.codegen.loops.emit import EMIT
from tests.fuzz.judge import Outcome
from tests.fuzz.operators import Single, judge_operator, judge_sample, operators

RIGHT = (
    *("cummax", "index_select", "unfold", "linspace tensor_overload", "nn.functional.linear"),
    *("nn.functional.conv1d", "fft.irfft2"),
)
REFUSED = {
    "sparse.mm reduce": "layout torch.sparse_csr: moec takes dense tensors",
    "nn.functional.linear_cross_entropy chunked": "is none of ATen's; write it in those",
    "lu_unpack": "operator aten.lu_unpack.default has no kernel",
    "native_batch_norm": "operator aten.native_batch_norm.default has no kernel",
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_operators_are_right_or_refused_in_words() -> None:
    table = operators()
    for name in RIGHT:
        line = judge_operator(table[name], False)
        assert line["outcome"] == Outcome.DENSE, (name, line)
    for name, words in REFUSED.items():
        line = judge_operator(table[name], False)
        assert (line["outcome"], words in line["words"]) == (Outcome.REFUSED, True), (name, line)


def test_pieces_without_elements_compile() -> None:
    def join(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :0], x.reshape(3, 2, 2)[:, 1:1].flatten(1), x], 1).relu()

    verdict = judge_sample(Single(join, ((torch.randn(3, 4),), {})), (torch.randn(3, 4),), True)
    assert verdict.outcome == Outcome.DENSE, verdict


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMIT, "aten.neg.default", EMIT["aten.abs.default"])
    x = torch.tensor([1.0, -2.0])
    verdict = judge_sample(Single(torch.neg, ((x,), {})), (x,), True)
    assert verdict.outcome == Outcome.WRONG, verdict


def test_a_kernel_that_cannot_be_written_is_a_defect_that_names_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(EMIT, "aten.cumsum.default", EMIT["aten.mm.default"])
    x = torch.ones(3)
    verdict = judge_sample(Single(torch.cumsum, ((x, 0), {})), (x,), False)
    assert verdict.outcome == Outcome.CRASH
    assert "operator aten.cumsum.default at operators.py" in verdict.words
    assert "a defect of moec; run the part" in verdict.words
