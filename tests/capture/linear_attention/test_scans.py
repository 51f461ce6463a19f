"""transformers' functions with kernel names are replaced if they compute the known function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import moec
from moec.capture import capture
from moec.capture.linear_attention.scans import kernel_name
from moec.errors import CaptureError

WIDTH, HEADS = 8, 2
TOLERANCE = 1e-5  # float32: chunks against positions, sums of 8 products


class Layer(nn.Module):
    """A scan over keys, values and decays that three linear maps make."""

    def __init__(self, scan: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(WIDTH, HEADS * WIDTH) for _ in range(3))
        self.scan = scan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(-1, (HEADS, WIDTH)) for m in self.maps)
        return self.scan(q, k, v, -x[..., :HEADS].abs())


def gated_delta_rule(q: Any, k: Any, v: Any, decay: Any) -> torch.Tensor:
    beta = decay.exp()
    y, state = qwen.torch_chunk_gated_delta_rule(q, k, v, decay, beta, output_final_state=True)
    return torch.cat([y.flatten(1), state.flatten(1)], 1)


def one_step(q: Any, k: Any, v: Any, decay: Any) -> torch.Tensor:
    beta, start = decay.exp(), torch.ones(q.shape[0], HEADS, WIDTH, WIDTH)
    y, state = qwen.torch_recurrent_gated_delta_rule(
        q, k, v, decay, beta, start, True, use_qk_l2norm_in_kernel=True
    )
    return torch.cat([y.flatten(1), state.flatten(1)], 1)


def kimi_delta_rule(q: Any, k: Any, v: Any, decay: Any) -> torch.Tensor:
    y, none = kimi.chunk_kimi_delta_attention(
        q, k, v, -q.abs(), decay.exp(), use_qk_l2norm_in_kernel=True
    )
    assert none is None
    return y


def mamba2(q: Any, k: Any, v: Any, decay: Any) -> torch.Tensor:
    rates = torch.tensor([-1.0, -0.5])
    return granite.mamba2_chunk_scan(v, -decay, rates, k, q, chunk_size=4, D=rates)


def mamba(q: Any, k: Any, v: Any, decay: Any) -> torch.Tensor:
    x, dt, b, c = (y[:, :, 0].mT for y in (v, q.abs(), k, q))
    rates = -torch.arange(1.0, WIDTH * WIDTH + 1).reshape(WIDTH, WIDTH) / 20
    return jamba.mamba_selective_scan(x, dt, rates, b, c, z=x, delta_softplus=True)


SCANS = {
    gated_delta_rule: qwen,
    one_step: qwen,
    kimi_delta_rule: kimi,
    mamba2: granite,
    mamba: jamba,
}
"""Each with the file that its function is looked up in."""


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.__name__)
def test_one_graph_serves_every_length(
    scan: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layer, "__module__", SCANS[scan].__name__)
    layer = Layer(scan)
    lengths = (1, 5, 70)
    compiled = moec.compile(layer, (torch.randn(2, lengths[-1], WIDTH),), verify=TOLERANCE)
    assert [op.name for op in compiled.graph.ops].count("nn.linear_attention") == 1
    for length in lengths:
        x = torch.randn(1, length, WIDTH)
        with torch.no_grad():
            want = layer(x)
        torch.testing.assert_close(compiled(x), want, rtol=TOLERANCE, atol=TOLERANCE)


@use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "no_such_package")
def another_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return value.cumsum(1), query.new_zeros(2, 4, 5, 3)


def test_what_computes_something_else_stays_as_it_is() -> None:
    assert kernel_name(another_rule) == "chunk_gated_delta_rule"
    layer = Layer(lambda q, k, v, decay: another_rule(q, k, v, decay, decay)[0])
    names = [op.name for op in capture(layer, (torch.randn(2, 7, WIDTH),)).program.graph.ops]
    assert "aten.cumsum.default" in names
    assert "nn.linear_attention" not in names


def test_packed_sequences_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "__module__", qwen.__name__)
    ends = torch.tensor([0, 3, 7])
    layer = Layer(
        lambda q, k, v, decay: qwen.torch_chunk_gated_delta_rule(
            q, k, v, decay, decay.exp(), cu_seqlens=ends
        )[0]
    )
    with pytest.raises(CaptureError, match="called with cu_seqlens, which moec does not know"):
        capture(layer, (torch.randn(2, 7, WIDTH),))


def test_the_functions_are_as_they_were_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "__module__", qwen.__name__)
    before = vars(qwen)["torch_chunk_gated_delta_rule"]
    capture(Layer(gated_delta_rule), (torch.randn(2, 7, WIDTH),))
    assert vars(qwen)["torch_chunk_gated_delta_rule"] is before
