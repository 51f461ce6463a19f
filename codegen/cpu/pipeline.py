"""The passes over kernels: TVM's default passes, as far as a CPU needs them, then moec's.

Left out are the passes for threads, shared memory and matrix units of GPUs, for other accelerators
and for FP8; and HoistIfThenElse, which takes a fifth of the time of all passes, while LLVM
generates the same code without it. AnnotateEntryFunc is left out too: it gives the only kernel of a
module a second name, which two objects of a library may not both define.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import s_tir, tirx

from moec.codegen.cpu.opaque import in_memory, opaque
from moec.codegen.cpu.outline import outlined

PIPELINE = "moec"
"""The name under which the pipeline is registered with TVM."""


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
    last = [tirx.transform.prim_func_pass(each, opt_level=0) for each in (in_memory, outlined)]
    passes = tvm.transform.Sequential(_passes())
    return passes, lambda: tvm.transform.Sequential([host(), *last]), device


tirx.register_tir_pipeline(PIPELINE, _pipeline)
