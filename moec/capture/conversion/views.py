"""The shape of a view that leaves one size open (-1)."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from moec.ir.sizes.dims import Dim, canonical, product


def view_shape(size: Sequence[Dim], source: Sequence[Dim], torch_shape: Sequence[Dim]) -> list[Dim]:
    """`size`, with an exact quotient in place of -1. `torch_shape` is torch's shape.

    torch infers floor(8*floor(B/2)/B) for view(2, B*S, -1) of [B, S, 8] exported at B = 4. It
    equals 4 only at even B; the quotient of all sizes by the other sizes is 4. torch's size is kept
    where the quotient is no polynomial with integer coefficients. torch also infers
    floor(B*S/floor(B*S/4)) for the 4 of view(-1, 4, 8), which no empty batch has, and 4*floor(S/4)
    for the S of view(B, S, 8), which is another number where B*S alone is a multiple of 4.
    """
    shape = [at if dim == -1 else dim for dim, at in zip(size, torch_shape, strict=True)]
    if list(size).count(-1) != 1:
        return shape
    others = product(tuple(dim for dim in size if dim != -1))
    if others == 0:
        return shape
    quotient = sympy.cancel(sympy.sympify(product(tuple(source))) / sympy.sympify(others))
    if not quotient.is_polynomial() or not all(c.is_Integer for c in _coefficients(quotient)):
        return shape
    return [canonical(quotient) if dim == -1 else at for dim, at in zip(size, shape, strict=True)]


def _coefficients(polynomial: sympy.Expr) -> list[sympy.Expr]:
    return list(polynomial.expand().as_coefficients_dict().values())
