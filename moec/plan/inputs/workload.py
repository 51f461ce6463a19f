"""The work of a cluster: tokens of a step, lengths of contexts, and dtypes of sent rows."""

from __future__ import annotations

from typing import Literal

from moec.plan.inputs.files import Natural, Positive, Quantity, Record
from moec.plan.inputs.model import BYTES


class Workload(Record, frozen=True, kw_only=True):
    """`tokens` of one step over all ranks; `context` is the number of tokens that each of
    `sequences` has in the cache; `send` and `back` are the dtypes of rows to the experts and back;
    `latency` is the target for a step in seconds."""

    tokens: Positive
    sequences: Natural
    context: Natural
    phase: Literal["prefill", "decode", "training"] = "decode"
    compute: str = "bf16"
    send: str = "bf16"
    back: str = "bf16"
    latency: Quantity | None = None

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
    def passes(self) -> int:
        """The number of products per weight: one forward, and in training two more backward."""
        return 3 if self.phase == "training" else 1


def training_memory(
    dense: float, sparse: float, activation: float, layers: int, devices: int
) -> dict[str, float]:
    """Bytes that training needs on all GPUs, in CPU memory and on disks, with experts stored on
    disks and active ones in CPU memory.

    SE-MoE (arXiv 2205.10034): 16 D + 4 a S / L, 16 a S and 12 S, for D dense and S sparse
    parameters, activation probability a and L MoE layers; each is divided by `devices`.
    """
    return {
        "gpu": (16 * dense + 4 * activation * sparse / layers) / devices,
        "cpu": 16 * activation * sparse / devices,
        "disk": 12 * sparse / devices,
    }
