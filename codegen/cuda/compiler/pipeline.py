"""TVM's pass pipeline for kernels that manage barriers and shared memory themselves.

The default pipeline inserts barriers, moves buffers, and fails on a shared load inside a condition.
So ThreadSync, StorageRewrite and HoistIfThenElse are left out. Loops marked to be unrolled stay
loops (`#pragma unroll`): nvcc unrolls them, in less time than TVM.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import s_tir, tirx

PIPELINE = "moec_cuda"
"""The name under which the pipeline is registered with TVM."""


def _passes() -> list[tvm.transform.Pass]:
    s, t = s_tir.transform, tirx.transform
    return [
        s.UnifyThreadBinding(),
        s.LowerMatchBuffer(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.BF16ComputeLegalize(),
        t.NarrowDataType(32),
        t.VectorizeLoop(True),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        t.CommonSubexprElim(),
        t.FP8ComputeLegalize(),
        t.VerifyMemory(),
        t.AnnotateEntryFunc(),
        s.MergeSharedMemoryAllocations(),
        t.SplitHostDevice(),
        t.MakePackedAPI(),
        t.FP8StorageLegalize(),
        t.BF16StorageLegalize(),
    ]


def _pipeline() -> tuple[
    tvm.transform.Pass, Callable[[], tvm.transform.Pass], Callable[[], tvm.transform.Pass]
]:
    _, host, device = tirx.get_tir_pipeline("default")
    return tvm.transform.Sequential(_passes()), host, device


tirx.register_tir_pipeline(PIPELINE, _pipeline)
