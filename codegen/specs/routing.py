"""Routers, the sort by expert, and what brings rows back: what their kernels compute."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ops.routing import Routing


@dataclass(frozen=True)
class RouteSpec:
    """One router: `logits` and `correction` are dtypes, the latter None where there is none."""

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
    """A router with its linear layer. dtypes: of x, weight, bias (None: there is none).

    `route.logits` is the dtype that the layer's result is rounded to before the scores; the
    products themselves are those of x and weight as they are.
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
    """Rows of experts back to their tokens; dtypes as TVM names them, None for an input that is
    not there."""

    num_experts: int
    top_k: int
    width: int
    out: str
    rows: str
    weights: str | None = None
    addend: str | None = None


@dataclass(frozen=True)
class ZeroSpec:
    """Sizes, and dtypes as TVM names them; None for an input that is not there."""

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
