"""Attention, caches of keys and values, linear attention: what their kernels compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class MaskSpec:
    """A mask that broadcasts to [B, Hq, S, L]; `full` says which of the four dims are not 1.

    A bool mask is True where a query attends; any other is added to the scaled scores.
    """

    dtype: str
    full: tuple[bool, bool, bool, bool]


@dataclass(frozen=True)
class AttentionSpec:
    """What is known when compiling; B, S and L are sizes of the call, 0 allowed.

    Position s sees key l where l <= s if `is_causal`, l > s - `window`, and l // `chunk` is
    s // `chunk` (both count from 0, whatever S and L: torch's meaning), and the mask allows it.
    `tokens_first` names those of q, k, v and out that are [B, S or L, heads, D]: what a linear
    layer produces, and reads, without any transpose. `sinks` adds one logit per head that only
    the denominator sees (GPT-OSS). `placed` queries count from first[b] instead: k and v are a
    cache of L places.
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
    """cos or sin, which broadcasts to [B, H, S]; `full` says which of the three are not 1.

    `width` is D, or D/2 where both halves of a row are turned alike.
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
        """The index of a row; of sizes, the shape of all."""
        return (b, s, h) if self.tokens_first else (b, h, s)


@dataclass(frozen=True)
class LinearAttentionSpec:
    """The fixed sizes (G, H, Dk, Dv) of one nn.linear_attention, and which inputs it has.

    `per`: what has a decay of its own, as in `moec.ops.linear_attention`.
    """

    shared: int
    heads: int
    key_dim: int
    value_dim: int
    per: Literal["head", "key", "rate"]
    delta: bool
    started: bool
