"""Specs of attention, caches of keys and values, and linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class MaskSpec:
    """A mask that broadcasts to [B, Hq, S, L]; `full` marks which of the four dims are not 1.

    A bool mask is True where a query attends; any other is added to the scaled scores.
    """

    dtype: str
    full: tuple[bool, bool, bool, bool]


@dataclass(frozen=True)
class AttentionSpec:
    """The constant properties of an attention; B, S and L vary by call and may be 0.

    Position s attends to key l if l <= s (`is_causal`), l > s - `window`, l // `chunk` is
    s // `chunk`, and the mask allows it; both positions count from 0 for any S and L, as in torch.
    `tokens_first` lists which of q, k, v and out are [B, S or L, heads, D], the layout of linear
    layers. `sinks` adds one logit per head to the softmax's denominator (GPT-OSS). With `placed`,
    queries count from first[b], and k and v are a cache of L positions.
    """

    dtype: str
    q_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    is_causal: bool = False
    mask: MaskSpec | None = None
    sinks: bool = False
    tokens_first: tuple[str, ...] = ()
    window: int | None = None
    chunk: int | None = None
    placed: bool = False

    def __post_init__(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"attention: {self.q_heads} query heads cannot share {self.kv_heads} key heads: "
                "the first must be a multiple of the second"
            )

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q_heads // self.kv_heads


@dataclass(frozen=True)
class AnglesSpec:
    """cos or sin, which broadcasts to [B, H, S]; `full` marks which of the three are not 1.

    `width` is D, or D/2 if both halves of a row have the same angles.
    """

    dtype: str
    full: tuple[bool, bool, bool]
    width: int


@dataclass(frozen=True)
class AppendSpec:
    """`tokens_first` rows are [B, S, H, D]; the cache never is. `turns` are cos and sin."""

    dtype: str
    heads: int
    width: int
    tokens_first: bool = False
    turns: tuple[AnglesSpec, AnglesSpec] | None = None

    def row(self, b: Any, h: Any, s: Any) -> tuple[Any, Any, Any]:
        """The index of a row; for sizes, the shape of the rows."""
        return (b, s, h) if self.tokens_first else (b, h, s)


@dataclass(frozen=True)
class LinearAttentionSpec:
    """The fixed sizes (G, H, Dk, Dv) of one nn.linear_attention, and which inputs it has.

    `per` is the granularity of the decay, as in `moec.ir.ops.dense.linear_attention`.
    """

    shared: int
    heads: int
    key_dim: int
    value_dim: int
    per: Literal["head", "key", "rate"]
    delta: bool
    started: bool
