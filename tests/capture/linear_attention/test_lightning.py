"""Lightning attention: one graph for all lengths, if the module computes the expected function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

import moec
from moec.capture import capture

TOLERANCE = 1e-5  # float32: blocks against positions, sums of 8 products
CONFIG = MiniMaxConfig(
    hidden_size=32,
    num_attention_heads=4,
    head_dim=8,
    block_size=4,
    num_hidden_layers=2,
    layer_types=["linear_attention", "linear_attention"],
)


class Layer(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attention(CONFIG, 0)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.attention(x, None, mask)[0]
        return y


def draw(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, : length // 2] = 0
    return torch.randn(2, length, 32), mask


def test_one_graph_serves_every_length() -> None:
    layer = Layer(MiniMaxLightningAttention)
    compiled = moec.compile(layer, draw(7), verify=TOLERANCE)
    assert [op.name for op in compiled.graph.ops].count("nn.linear_attention") == 1
    for length in (1, 4, 5, 30):
        x, mask = draw(length)
        with torch.no_grad():
            want = layer(x, mask)
        torch.testing.assert_close(compiled(x, mask), want, rtol=TOLERANCE, atol=TOLERANCE)


class Reversed(MiniMaxLightningAttention):  # type: ignore[misc]
    """Looks the same, and reads the sequence from its end."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y, mask = super().forward(hidden_states.flip(1), *args, **kwargs)
        return y.flip(1), mask


def test_what_computes_something_else_stays_as_it_is() -> None:
    """Its loop over blocks of four tokens is one block in the example, which bounds the length."""
    before = Reversed.forward
    program = capture(Layer(Reversed), draw(3)).program
    assert "nn.linear_attention" not in [op.name for op in program.graph.ops]
    assert program.graph.bounds["S"].high == 4
    assert Reversed.forward is before
