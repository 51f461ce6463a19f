"""The work of a cluster: tokens of a step, lengths of contexts, and dtypes of sent rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError
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


Loads = NDArray[np.float64]
_FORM = re.compile(r"(uniform|zipf|lognormal)(?::(\d+(?:\.\d+)?))?(?::(\d+))?")


def of_distribution(text: str, experts: Sequence[int]) -> tuple[Loads, ...]:
    """Loads [E_l] of each layer, summing to 1: "uniform", "zipf:EXPONENT[:SEED]" or
    "lognormal:SIGMA[:SEED]", in a random order for each layer.

    Raises UsageError for any other text, and for a parameter above 20.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text} is not a distribution: write uniform, zipf:1.01 or lognormal:1.0, then :SEED"
        )
    kind, parameter, seed = match[1], float(match[2] or 1.0), int(match[3] or 0)
    if parameter > 20:
        raise UsageError(f"{text}: write a parameter of at most 20; 1 is a usual skew")
    generator = np.random.default_rng(seed)
    loads = []
    for count in experts:
        match kind:
            case "uniform":
                load = np.ones(count)
            case "zipf":
                load = generator.permutation(np.arange(1, count + 1) ** -parameter)
            case _:
                load = generator.lognormal(0.0, parameter, count)
        loads.append(normalised(load))
    return tuple(loads)


def normalised(load: Loads) -> Loads:
    """Shares that sum to 1; equal shares where the sum is 0."""
    total = float(load.sum())
    return load / total if total > 0 else np.full(len(load), 1 / max(1, len(load)))
