"""Which parts of the routing are float32 in a 16-bit module, where near ties change the choice."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moec
from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.description import Description, Output, Router, RoutingRule
from moec.capture.behaviour.proof import proof
from moec.capture.behaviour.proof.cases import cases
from moec.capture.behaviour.proof.precision import with_precision
from moec.capture.behaviour.proof.probe import Probe
from moec.capture.behaviour.replacement import Replacement
from moec.interpret.evaluate import evaluate
from tests.capture.behaviour.modules import EXPERTS, TOP_K, WIDTH, CountsInNumpy

DESCRIPTION = Description(
    experts=tuple(f"experts.{number}" for number in range(EXPERTS)),
    router=Router(weight="gate.weight"),
    routing=RoutingRule(score="softmax", top_k=TOP_K, renormalise=True),
    outputs=(Output("hidden", "tokens"),),
)


class InFloat32(CountsInNumpy):
    precision = "logits"

    def choose(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.precision == "logits":
            logits = F.linear(flat.float(), self.gate.weight.float())
        else:
            logits = self.gate(flat).float() if self.precision else self.gate(flat)
        weights, ids = logits.softmax(-1).topk(TOP_K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(flat.dtype), ids


def layer(precision: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    module = InFloat32().to(dtype).eval()
    module.precision = precision
    return module


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("", torch.bfloat16),
        ("scores", torch.bfloat16),
        ("logits", torch.bfloat16),
        ("logits", torch.float16),
    ],
)
def test_the_module_says_what_it_computes_in_float32(precision: str, dtype: torch.dtype) -> None:
    module = layer(precision, dtype)
    probe = Probe(module, Arguments.of((torch.randn(2, 12, WIDTH, dtype=dtype),), {}))
    description = with_precision(module, probe, DESCRIPTION)
    assert description == replace(DESCRIPTION, precision=precision)
    x = torch.randn(9, 200, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        ids = Replacement(module, description, WIDTH)(x)["ids"]
        assert torch.equal(ids, module.choose(x.reshape(-1, WIDTH))[1])


def test_what_is_float32_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1800 tokens, some have logits that are equal only in bfloat16. Their experts are those of
    eager, so all rows are within the rounding of bfloat16. Only two cases are proved, because the
    rules are tested elsewhere."""
    monkeypatch.setattr(proof, "cases", lambda probe: itertools.islice(cases(probe), 2))
    module = layer("logits", torch.bfloat16)
    described = moec.describe(
        InFloat32, router="gate", experts="experts", top_k=TOP_K, renormalise=True
    )
    example = torch.randn(2, 12, WIDTH).bfloat16()
    compiled = moec.compile(module, (example,), build=False, descriptions=[described])
    assert [block.top_k for block in compiled.blocks] == [TOP_K]
    assert "precision=logits" in " ".join(compiled.captured.notes)
    x = torch.randn(9, 200, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    program = compiled.pass_results[-1].program
    (y,) = evaluate(program.graph, [x], program.weights)
    with torch.no_grad():
        torch.testing.assert_close(y, module(x), rtol=2**-6, atol=2**-7)
