"""Products of each expert's rows with that expert's weights; rows are sorted by expert.

    y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]

"row of r" is r itself or, with a fused dispatch, the token order[r] // top_k: then the rows of x
are not copied. Rows without an expert become 0, unless `zero_unowned_rows` is False, which is
correct if no op reads them.
"""

from __future__ import annotations

from tvm.tirx import PrimFunc

from moec.codegen.cpu.gemm.linear import plain_product
from moec.codegen.cpu.gemm.sorted_rows import sorted_product
from moec.codegen.cpu.gemm.tile import Epilogue
from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import CpuTarget


def grouped_linear(
    target: CpuTarget,
    spec: LinearSpec,
    epilogue: Epilogue | None = None,
    name: str = "grouped",
    zero_unowned_rows: bool = True,
    *,
    from_slots: bool = False,
) -> PrimFunc:
    """A kernel (x[R, k], ends i32[E][, key, plan], w packed[, bias packed], y[R, n]).

    `from_slots` is that of `sorted_product`.
    """
    return _grouped(target, spec, epilogue, name, 0, None, zero_unowned_rows, from_slots)


def gathered_linear(
    target: CpuTarget,
    spec: LinearSpec,
    top_k: int,
    epilogue: Epilogue | None = None,
    scale_dtype: str | None = None,
    name: str = "gathered",
    zero_unowned_rows: bool = True,
    *,
    from_slots: bool = False,
) -> PrimFunc:
    """A kernel (x[T, k], order i32[R], ends i32[E][, key, plan], w packed[, bias packed][, scale],
    y[R, n]).

    With `scale_dtype`, scale[T, top_k] multiplies the row of x of each choice (the product is
    scaled before the bias is added, which is equivalent). `from_slots` is that of `sorted_product`.
    """
    return _grouped(target, spec, epilogue, name, top_k, scale_dtype, zero_unowned_rows, from_slots)


def _grouped(
    target: CpuTarget,
    spec: LinearSpec,
    epilogue: Epilogue | None,
    name: str,
    top_k: int,
    scale_dtype: str | None,
    zero_unowned_rows: bool,
    from_slots: bool,
) -> PrimFunc:
    if spec.gated and epilogue is None:
        raise ValueError(f"{name}: gate and up need an epilogue that joins them")
    product = plain_product(target, spec, epilogue)
    return sorted_product(
        product, name, top_k, scale_dtype, zero_unowned_rows, from_slots=from_slots
    )
