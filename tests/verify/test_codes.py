"""Codes of `--quant` beside the weights that they round: faults of the rounding pass itself, and of
the packing behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import moec
from moec.codegen.backends.cpu import codes as packing
from moec.errors import VerificationError
from moec.ir.formats.integer import Quantised
from moec.passes.quantise import codes as rounding

FORMATS = ["int8", "int6", "int5:32", "int4:32", "int4:32:asymmetric", "int3:32", "fp8", "mxfp4"]


class TopK(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4, bias=False)
        self.up, self.down = (nn.Parameter(torch.empty(4, 64, 64)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.router(x).softmax(-1).topk(2)
        hidden = torch.einsum("td,edh->teh", x, self.up).relu()
        outputs = torch.einsum("teh,ehd->ted", hidden, self.down)
        one_hot = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, chosen, scores)
        return torch.einsum("ted,te->td", outputs, one_hot)


def compiled(quant: str, std: float = 0.2) -> moec.CompiledModel:
    torch.manual_seed(0)
    model = TopK().eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=std)
    return moec.compile(model.bfloat16(), (torch.randn(20, 64).bfloat16(),), quant=quant)


def scaled(factor: float) -> Callable[[Quantised], Quantised]:
    def fault(quantised: Quantised) -> Quantised:
        scales = quantised.scales.clone()
        one = scales[-1, 3, :1]
        one.copy_(one + 1 if one.dtype == torch.uint8 else one * factor)
        return replace(quantised, scales=scales)

    return fault


def one_code(quantised: Quantised) -> Quantised:
    codes = quantised.codes.clone()
    codes[-1, -1, -1] ^= 3
    return replace(quantised, codes=codes)


def one_zero(quantised: Quantised) -> Quantised:
    if quantised.zeros is None:
        return one_code(quantised)
    zeros = quantised.zeros.clone()
    zeros[0, 0, 0] += 1
    return replace(quantised, zeros=zeros)


@pytest.mark.parametrize("quant", FORMATS)
def test_the_nearest_codes_are_right(quant):
    compiled(quant)


FAULTS = {
    "scale x 1.1": scaled(1.1),
    "scale x 2": scaled(2),
    "scale x 16": scaled(16),
    "scale x -1": scaled(-1),
    "a code": one_code,
    "a zero": one_zero,
}
SOME = [("int4:32", fault) for fault in FAULTS]
SOME += [(quant, fault) for quant in FORMATS for fault in ("scale x 1.1", "a code")]
SOME.append(("int4:32:asymmetric", "a zero"))


@pytest.mark.parametrize(("quant", "fault"), [*dict.fromkeys(SOME)])
def test_a_fault_of_the_rounding_pass_is_found(quant, fault, monkeypatch):
    quantise = rounding.quantise
    monkeypatch.setattr(rounding, "quantise", lambda *args: FAULTS[fault](quantise(*args)))
    with pytest.raises(VerificationError, match="are further from their codes than half a step of"):
        compiled(quant)


@pytest.mark.parametrize("quant", ["int4:32", "fp8", "mxfp4"])
@pytest.mark.parametrize("part", ["pack_codes", "pack_scales"])
def test_a_fault_of_the_packing_is_found(quant, part, monkeypatch):
    pack = getattr(packing, part)

    def broken(*args):
        array = pack(*args).copy()
        array.reshape(-1).view("u1")[0] ^= 1
        return array

    monkeypatch.setattr(packing, part, broken)
    with pytest.raises(VerificationError, match="is stored with other bits than the model's"):
        compiled(quant)
