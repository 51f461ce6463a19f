"""The work of a cluster: tokens of a step, lengths of contexts, and dtypes of sent rows."""

from __future__ import annotations

from typing import Literal

from moec.plan.inputs.files import Natural, Positive, Quantity, Record
from moec.plan.inputs.model import BYTES, Layers, Model

Phase = Literal["prefill", "decode", "training"]
TOKENS: dict[Phase, int] = {"prefill": 4096, "decode": 128, "training": 4096}
"""Tokens of a step on each device: the batches for which DeepEP publishes its times."""


class Workload(Record, frozen=True, kw_only=True):
    """`tokens` of one step over all ranks. In decode, each of `sequences` has `context` tokens in
    the cache, to which a new token attends. In prefill, a step computes parts of `sequences`
    prompts of `context` tokens; in training, texts of `context` tokens, without a cache. `send`
    and `back` are the dtypes of rows to the experts and back; `latency` is the target for a step
    in seconds. With `overlap`, the tokens of a rank are two micro-batches, and the exchange of one
    runs during the products of the other (DeepSeek-V3, arXiv 2412.19437, section 3.4)."""

    tokens: Positive
    sequences: Natural
    context: Natural
    phase: Phase = "decode"
    compute: str = "bf16"
    send: str = "bf16"
    back: str = "bf16"
    latency: Quantity | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        for dtype in (self.send, self.back):
            if dtype not in BYTES:
                raise ValueError(f"{dtype} is not one of {', '.join(BYTES)}")

    @property
    def row_bytes(self) -> tuple[float, float]:
        """Bytes per value of a row, to the experts and back."""
        return BYTES[self.send], BYTES[self.back]

    @property
    def weight_bytes(self) -> float | None:
        """Bytes per parameter with gradients and optimiser states (SE-MoE, arXiv 2205.10034: 16);
        None where weights are stored as in the model."""
        return 16.0 if self.phase == "training" else None

    @property
    def attended(self) -> float:
        """The mean number of tokens to which a token attends: the whole context in decode; those
        before it in its text, and itself, in the other phases."""
        return float(self.context) if self.phase == "decode" else (self.context + 1) / 2

    @property
    def passes(self) -> int:
        """The number of products per weight: one forward, and in training two more backward."""
        return 3 if self.phase == "training" else 1


def activations(model: Model, layer: Layers) -> tuple[int, int]:
    """Numbers that the backward pass of a layer needs of each token, and of each row of an expert.

    Counted as in Korthikanti et al. (arXiv 2205.05198, section 4.1) without dropout, and without
    scores, which are computed again (flash attention): inputs of norms, products and activation
    functions; queries, keys, values and their sums; outputs of experts, which are weighted.
    """
    key, value = layer.widths
    pairs = layer.heads * (key + value) if layer.latent else layer.kv_values
    attention = layer.heads * (key + value) + pairs
    token = 4 * model.width + attention + layer.matrices * layer.dense_hidden
    return token, 2 * model.width + layer.matrices * layer.hidden
