"""Choices beyond a capacity add nothing, although their weights are NaN: a token without any choice
left divides 0 by 0, and eager never reads the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.ir.interpret.evaluate import evaluate

D, E, K, CAPACITY = 8, 4, 2, 3


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        hot = F.one_hot(ids.t().reshape(-1), E)
        position = ((hot.cumsum(0) - 1) * hot).sum(-1).view(K, -1).t()
        within = position < CAPACITY
        weights = weights * within.to(weights.dtype)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where((ids == e) & within)
            y.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return y


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Dropping().eval()


@pytest.fixture(scope="module")
def compiled(module: nn.Module) -> moec.CompiledModel:
    return moec.compile(module, (torch.randn(6, D),))


def rows(alike: bool) -> Tensor:
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    return x[:1].expand(9, D).contiguous() if alike else x


@pytest.mark.parametrize("alike", [True, False])
def test_machine_code_and_interpreter(
    compiled: moec.CompiledModel, module: nn.Module, alike: bool
) -> None:
    x = rows(alike)
    with torch.no_grad():
        expected = module(x)
    assert compiled.blocks
    assert expected.isfinite().all()
    if alike:
        assert not expected[CAPACITY:].any()
    program = compiled.pass_results[-1].program
    (interpreted,) = evaluate(program.graph, [x], program.weights)
    for result in (compiled(x), interpreted):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_float64(module: nn.Module) -> None:
    """Sums in float64 have no kernel; generic loops leave out the same rows. Routers compute in
    float32."""
    double = Dropping().double().eval()
    double.load_state_dict(module.state_dict())
    compiled = moec.compile(double, (rows(alike=False).double(),))
    assert compiled.blocks
    for alike in (True, False):
        x = rows(alike).double()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), double(x), atol=1e-6, rtol=1e-6)


def test_onnx(compiled: moec.CompiledModel, module: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    exported = compiled.export_onnx(tmp_path / "dropping.onnx", verify=False)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    x = rows(alike=True)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(torch.from_numpy(result), expected, atol=1e-5, rtol=1e-5)


class AboveThreshold(Dropping):
    """An expert reads the tokens whose weight for it is above a threshold."""

    def reads(self, share: Tensor, number: int) -> Tensor:
        return share > 0.3

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(3, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (ids == number)).sum(-1)
            rows = self.reads(share, number).nonzero()[:, 0]
            y.index_add_(0, rows, expert(x[rows]) * share[rows, None])
        return y


class AtLeast(AboveThreshold):
    def reads(self, share: Tensor, number: int) -> Tensor:
        return share >= 0.25


class OtherThreshold(AboveThreshold):
    """The last expert has a threshold of its own."""

    def reads(self, share: Tensor, number: int) -> Tensor:
        return share > (0.3 if number < E - 1 else 0.4)


@pytest.mark.parametrize("kind", [AboveThreshold, AtLeast, OtherThreshold])
def test_rows_above_a_threshold(kind: type[AboveThreshold]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    compiled = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    assert len(compiled.blocks) == (kind is not OtherThreshold)
    program = compiled.pass_results[-1].program
    for tokens in (1, 5, 64):
        x = torch.randn(tokens, D)
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, module(x).detach(), rtol=1e-5, atol=1e-6)
