"""The layers that are measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Gated experts in 16 bits: `width` is that of the model, `hidden` that of an expert."""

    experts: int
    top_k: int
    width: int
    hidden: int

    def active(self, tokens: int) -> float:
        """The expected number of experts that have rows."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


LAYERS = {
    "olmoe-1b-7b": LayerShape(64, 8, 2048, 1024),
    "granite-1b-a400m": LayerShape(32, 8, 1024, 512),
    "qwen3-30b-a3b": LayerShape(128, 8, 2048, 768),
    "mixtral-8x7b": LayerShape(8, 2, 4096, 14336),
    "deepseek-v2-lite": LayerShape(64, 6, 2048, 1408),
}
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
