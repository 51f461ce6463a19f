"""Specs of routers, the sort by expert, the combine, and experts without a network."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.ops.routing.routing import Routing


@dataclass(frozen=True)
class RouteSpec:
    """One router. `logits` and `correction` are dtypes; `correction` is None without one."""

    routing: Routing
    num_experts: int
    logits: str
    correction: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.routing.k <= self.num_experts:
            raise ValueError(f"route: k={self.routing.k} of {self.num_experts} experts")
        if self.num_experts % self.routing.groups:
            raise ValueError(
                f"route: {self.num_experts} experts are not {self.routing.groups} equal groups"
            )


@dataclass(frozen=True)
class GateSpec:
    """A router with its linear layer. dtypes: of x, weight, bias (None without one).

    `route.logits` is the dtype that the layer's result is rounded to before the scores; x and
    weight are not rounded.
    """

    route: RouteSpec
    width: int
    x: str
    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class DispatchSpec:
    """A stable sort of choices [T, k] by expert."""

    num_experts: int
    top_k: int


@dataclass(frozen=True)
class CombineSpec:
    """The weighted sum of each token's rows. dtypes are TVM's names, None for an absent input."""

    num_experts: int
    top_k: int
    width: int
    out: str
    rows: str
    weights: str | None = None
    addend: str | None = None


@dataclass(frozen=True)
class ZeroSpec:
    """Experts without a network: sizes and dtypes (TVM's names, None for an absent input)."""

    first: int
    kinds: tuple[str, ...]
    top_k: int
    width: int
    x: str
    out: str
    weights: str | None = None
    mix: str | None = None
    values: str | None = None
    addend: str | None = None
