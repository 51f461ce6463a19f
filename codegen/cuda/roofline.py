"""The least time that the kernels of a layer could take on a GPU: a model, not a measurement.

    time of a kernel = max(bytes / bandwidth, FLOPs / peak)        Williams et al., 2009

Each kernel reads and writes its tensors from and to memory, so reuse through a cache between
kernels is ignored. Weights of a product are read again for each group of tiles of rows
(gemm/tiles.py), as if none stayed in the cache; the rows of a group stay there. Routing is uniform:
of E experts, E * (1 - (1 - k/E)^T) have rows. Launches are counted but add no time here; outside a
CUDA graph, each takes some microseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.codegen.cuda.gemm.tiles import FEW_ROWS, GROUPED, LARGE
from moec.target.cuda import CudaTarget

_HALF, _FLOAT, _INT, _LONG = 2, 4, 4, 8  # bytes
_FEW_QUERIES, _PART = 16, 64  # queries whose keys are split; keys of a part, at least


@dataclass(frozen=True)
class LayerShape:
    """Gated experts in 16 bits: `width` is that of the model, `hidden` that of an expert."""

    experts: int
    top_k: int
    width: int
    hidden: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of the three matrices of one expert."""
        return 3 * self.width * self.hidden * _HALF

    def active(self, tokens: int) -> float:
        """The expected number of experts that have rows."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


@dataclass(frozen=True)
class Work:
    """The bytes that one kernel moves, the FLOPs that it computes, and its launches. A product in
    tiles is by wgmma on GPUs that have it."""

    kernel: str
    bytes: float
    flops: float = 0.0
    launches: int = 1
    is_product: bool = False

    def seconds(self, target: CudaTarget) -> float:
        return max(self.bytes / target.bandwidth, self.flops / target.bf16_peak)


def layer_work(layer: LayerShape, tokens: int) -> tuple[Work, ...]:
    """The work of each kernel of codegen/cuda for one layer, in launch order."""
    rows, active = tokens * layer.top_k, layer.active(tokens)
    reads = _reads(rows / active) if active else 0.0
    up, down = (part * layer.expert_bytes / 3 * active * reads for part in (2, 1))
    x, hidden, y = tokens * layer.width, rows * layer.hidden, rows * layer.width
    flops = 2.0 * rows * layer.width * layer.hidden  # of one matrix
    return (
        Work("route", tokens * layer.experts * _FLOAT + rows * (_FLOAT + _LONG)),
        Work("dispatch", rows * (2 * _LONG + 2 * _INT) + layer.experts * _INT),
        Work("up", up + (x + hidden) * _HALF + rows * _INT, 2 * flops, is_product=True),
        Work("down", down + (hidden + y) * _HALF, flops, is_product=True),
        Work("combine", (y + x) * _HALF + rows * (_INT + _FLOAT), 2.0 * y),
    )


@dataclass(frozen=True)
class AttentionShape:
    """Attention in 16 bits with grouped heads: `keys` heads of keys and values."""

    width: int
    heads: int
    keys: int
    dim: int


def attention_work(
    shape: AttentionShape, texts: int, new: int, past: int, sms: int = 132
) -> tuple[Work, ...]:
    """The work of each kernel around attention, for `new` tokens of each of `texts` texts, which
    have `past` tokens in the cache. Keys and values are read once per text; a causal query meets
    the past and, on average, half of the new tokens. The keys of few queries are split over blocks,
    whose parts a second launch adds; so is k of products with tiles for fewer than half of the
    `sms` SMs. The parts stay in the L2 cache."""
    tokens, cached = texts * new, texts * (past + new)
    q, kv = shape.heads * shape.dim, shape.keys * shape.dim
    x, projected = tokens * shape.width, q + 2 * kv
    scores = tokens * (past + (new + 1) / 2)
    return (
        Work(
            "qkv",
            (shape.width * projected * _reads(tokens) + x + tokens * projected) * _HALF,
            2.0 * tokens * shape.width * projected,
            _launches(tokens, q, sms),  # of the query projection, the largest
            is_product=True,
        ),
        Work("append", tokens * 2 * kv * 2 * _HALF),
        Work(
            "attention",
            (2 * tokens * q + 2 * cached * kv) * _HALF,
            4.0 * scores * q,
            launches=2 if new < _FEW_QUERIES and past + new >= 2 * _PART else 1,
        ),
        Work(
            "output",
            (q * shape.width * _reads(tokens) + tokens * q + x) * _HALF,
            2.0 * tokens * q * shape.width,
            _launches(tokens, shape.width, sms),
            is_product=True,
        ),
    )


def _reads(rows: float) -> float:
    """How often weights are read for so many rows: once, and again where a group of tiles of rows
    ends within them."""
    tiles = max(1, math.ceil(rows / LARGE.rows))
    return 1 + (tiles - 1) / GROUPED


def _launches(rows: int, columns: int, sms: int) -> int:
    """Of a dense product in 16 bits."""
    tiles = -(-rows // LARGE.rows) * -(-columns // LARGE.columns)
    return 2 if rows > FEW_ROWS and 2 * tiles <= sms else 1


def layer_seconds(layer: LayerShape, tokens: int, target: CudaTarget) -> float:
    return sum(work.seconds(target) for work in layer_work(layer, tokens))
