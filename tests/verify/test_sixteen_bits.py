"""In 16 bits the meaning of the graph is compared in float32, and the code by eager's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from moec.errors import VerificationError
from moec.model.compiled import CompiledModel
from moec.verify.check import check
from tests.capture.modules import WIDTH, Function, Moe
from tests.verify.test_faults import run_of

DTYPES = (torch.bfloat16, torch.float16)


class Scaled(Moe):
    """1 + scale is a constant, which a pass folds in the module's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.register_buffer("scale", (torch.randn(WIDTH) * 0.2).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + self.scale)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor]:
    return (torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype),)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return moec.compile(Moe(request.param), inputs(request.param))


def runs(compiled: CompiledModel, factor: float = 1.0) -> Any:
    """The code, with results that are off by a factor."""
    return run_of(compiled, lambda results: results.mul_(factor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_that_are_folded_in_16_bits_are_right(dtype: torch.dtype) -> None:
    assert moec.compile(Scaled(dtype), inputs(dtype)).checked is not None


def test_code_that_is_off_by_four_roundings_is_found(compiled: CompiledModel) -> None:
    spacing = torch.finfo(compiled.captured.example[0].dtype).eps
    check(compiled.captured, runs(compiled), compiled.pass_results)
    with pytest.raises(VerificationError, match=r"differs from eager by .*code is wrong"):
        check(compiled.captured, runs(compiled, 1 + 4 * spacing), compiled.pass_results)


def test_nan_of_eager_in_float32_excuses_nothing(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are NaN there differ from eager's too, which would allow any other row."""
    monkeypatch.setattr(
        "moec.verify.references.exact_eager",
        lambda captured, *rest: (
            lambda *case: [out.float() * torch.nan for out in captured.eager(*case)]
        ),
    )
    with pytest.raises(VerificationError):
        check(compiled.captured, runs(compiled, 1.5), compiled.pass_results)


ROWS = {
    "log": lambda x: (x + 1e-8).log(),
    "difference": lambda x: (x * 300).square() - (x * 300).square().flip(0),
    "quotient": lambda x: x / x.amax(-1, keepdim=True).clamp(min=1e-9),
    "masked": lambda x: torch.where(x < 1, -1e5, x).softmax(-1),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_the_model_in_its_dtype_has_of_nan_the_code_may_have(name: str) -> None:
    """Where float32 has numbers: 1e-8 is 0 in float16, and 1e5 is infinity."""
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).relu().half()
    x[0, 2:] = 0
    module = Function(lambda x: ROWS[name](x.relu()))
    result = moec.compile(module, (x,))(x)
    assert not module(x).isfinite().all()
    torch.testing.assert_close(result, module(x), rtol=2e-3, atol=1e-3, equal_nan=True)
