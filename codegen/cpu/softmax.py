"""Functions of softmax in addition to `Vector`: a short exp, sums of many vectors, bf16 pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.vector import Vector


@dataclass(frozen=True)
class Softmax:
    """Functions on float32 vectors of `v.lanes` lanes, for softmax over many of them."""

    v: Vector

    def exp(self, x: Expr) -> Expr:
        """exp(x) for x <= 0, within 1e-7 (absolute); 0 below -88; NaN stays NaN."""
        return T.bind(self._call(self.v.dtype, "soft_exp", x))

    def top(self, x: Expr) -> Expr:
        """The greatest lane as a scalar; a NaN may or may not win."""
        return T.bind(self._call("float32", "top", x))

    def sums(self, vectors: Sequence[Expr]) -> Expr:
        """`lanes` vectors -> one vector of the sum of each, added as trees."""
        return T.bind(self._call(self.v.dtype, "sums", *vectors))

    def round_pairs(self, x: Expr) -> Expr:
        """The lanes rounded to bf16, as half as many int32; needs `target.bf16_dot`."""
        return self._call(f"int32x{self.v.lanes // 2}", "round_pairs", x)

    def _call(self, dtype: str, name: str, *args: Expr) -> Expr:
        return T.call_extern(dtype, f"moec_{name}_{self.v.lanes}", *args)
