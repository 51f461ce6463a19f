"""TVM's default passes over kernels, as far as a CPU needs them, and ours after them.

Left out are those for threads, shared memory and matrix units of GPUs, for other accelerators and
for FP8, which have nothing to do here, and HoistIfThenElse: it takes a fifth of the time of all,
and LLVM makes the same code of our kernels without it. AnnotateEntryFunc is left out as well: it
gives a kernel that is alone in its module a second name, which two objects of a library may not
both define.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import s_tir, tirx

from moec.codegen.cpu.opaque import opaque
from moec.codegen.cpu.outline import outlined

PIPELINE = "moec"
"""The name under which TVM finds it."""


def _passes() -> list[tvm.transform.Pass]:
    s, t = s_tir.transform, tirx.transform
    return [
        tirx.transform.prim_func_pass(opaque, opt_level=0),
        s.CanonicalizeLoop(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.AnnotateIrregularLoop(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.BF16ComputeLegalize(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        t.StorageRewrite(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
        t.VerifyMemory(),
        t.SplitHostDevice(),
        t.MakePackedAPI(),
        t.BF16StorageLegalize(),
    ]


def _pipeline() -> tuple[tvm.transform.Pass, Callable[[], tvm.transform.Pass], object]:
    _, host, device = tirx.get_tir_pipeline("default")
    last = tirx.transform.prim_func_pass(outlined, opt_level=0)
    passes = tvm.transform.Sequential(_passes())
    return passes, lambda: tvm.transform.Sequential([host(), last]), device


tirx.register_tir_pipeline(PIPELINE, _pipeline)
