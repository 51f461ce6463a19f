"""Specs of products with constant weights."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.formats.notation import Format

INT8 = Format("int8")


@dataclass(frozen=True)
class LinearSpec:
    """y[rows, n] = f(x[rows, k] @ w[e]^T + bias[e]) for the rows of each of `groups` experts.

    Gated: y = f(x @ gate[e]^T + gate_bias[e], x @ up[e]^T + up_bias[e]).
    `dtype` is that of x and of the weights before packing: float32, bfloat16 or float16.
    """

    n: int
    k: int
    dtype: str
    out_dtype: str = ""  # empty: dtype
    groups: int = 1
    gated: bool = False
    bias: bool = False

    @property
    def y_dtype(self) -> str:
        return self.out_dtype or self.dtype


@dataclass(frozen=True)
class QuantisedSpec(LinearSpec):
    """Like LinearSpec, for weights of `format`. x is codes, to which `dtype` does not apply; for
    fp8 on CPUs x is floats."""

    format: Format = INT8


@dataclass(frozen=True)
class MixedSpec(LinearSpec):
    """Like QuantisedSpec, for experts of several `formats`, and so many `counts` of each."""

    formats: tuple[Format, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[QuantisedSpec, ...]:
        """The product of the experts of each format."""
        sizes = self.n, self.k, self.dtype, self.out_dtype
        each = zip(self.formats, self.counts, strict=True)
        return tuple(
            QuantisedSpec(*sizes, groups=count, gated=self.gated, bias=self.bias, format=format)
            for format, count in each
        )


@dataclass(frozen=True)
class CompressedSpec(LinearSpec):
    """Like LinearSpec, for ternary weights. x is integers; `dtype` does not apply to it."""

    bytes_of_counts: tuple[int, ...] = (1, 1)
    """The width in bytes of the counts in the starts of each stack."""
