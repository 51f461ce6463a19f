"""Kernels of one way alone, which `grouped_linear` chooses among at launch."""

from __future__ import annotations

from tvm.tirx import PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.gemv import check_few_rows, launch_few_rows
from moec.codegen.cuda.gemm.grouped_wgmma import check_wgmma, launch_wgmma
from moec.codegen.cuda.gemm.product import arguments, dense_arguments
from moec.codegen.cuda.instructions import kernel
from moec.codegen.specs.products import LinearSpec
from moec.target.cuda import CudaTarget


def gemv(
    spec: LinearSpec, target: CudaTarget, *, epilogue: Epilogue | None = None, top_k: int = 0,
    dense: bool = False, blocks: int = 0, name: str = "gemv",
) -> PrimFunc:  # fmt: skip
    """Few rows. The arguments of `grouped.grouped_linear` or, if `dense`, of `grouped.linear`."""
    check_few_rows(spec, epilogue)
    with kernel(name) as builder:
        p = dense_arguments(spec) if dense else arguments(spec, epilogue, top_k)
        launch_few_rows(p, target, blocks)
    return builder.get()


def grouped_linear_wgmma(
    spec: LinearSpec, target: CudaTarget, *, epilogue: Epilogue | None = None, top_k: int = 0,
    blocks: int = 0, name: str = "grouped",
) -> PrimFunc:  # fmt: skip
    """Many rows, by wgmma. The arguments of `grouped.grouped_linear`."""
    check_wgmma(spec, target, epilogue)
    with kernel(name) as builder:
        launch_wgmma(arguments(spec, epilogue, top_k), target, blocks)
    return builder.get()
