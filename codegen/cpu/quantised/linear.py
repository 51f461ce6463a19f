"""Dense products with quantised weights: several products of the same rows are one kernel.

    y[T, n] = (sum of blocks b: sx[row, b] * sw[b] * (x[row, b] . (w[b] - z[b]))) + bias

The tile is that of experts (tile.py); tiles and chunks of rows are shared among threads as in other
dense products (gemm/linear.py).
"""

from __future__ import annotations

from tvm.tirx import PrimFunc

from moec.codegen.cpu.gemm.linear import dense_products
from moec.codegen.cpu.quantised.grouped import quantised_product
from moec.codegen.specs.products import QuantisedSpec
from moec.target.cpu import CpuTarget


def quantised_linears(
    target: CpuTarget, specs: tuple[QuantisedSpec, ...], name: str = "quantised_linears"
) -> PrimFunc:
    """A kernel (codes, scales, sums of x[T, k], (w, its scales[, its zeros][, bias packed]) of
    each product, y[T, n] of each)."""
    if len({(spec.k, spec.format.block, spec.format.row_bits) for spec in specs}) != 1:
        raise ValueError(f"{name}: the products are of rows of other widths or blocks, or bits")
    if any(spec.groups != 1 or spec.gated for spec in specs):
        raise ValueError(f"{name}: the products must be dense, each with one matrix")
    return dense_products([quantised_product(target, spec) for spec in specs], name)
