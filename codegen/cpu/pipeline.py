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
from tvm.ir import StringImm, Var
from tvm.tirx import AttrStmt, Evaluate, For, ForKind, IfThenElse, PrimFunc, SeqStmt, Stmt
from tvm.tirx.analysis import undefined_vars

from moec.codegen.cpu.opaque import in_memory, opaque
from moec.codegen.cpu.parallel import WORTH

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


# ---- parallel loops that may be too short to share: one body, run by all threads or by one ---
#     moec.worth w: parallel i in n: body
#
# becomes
#
#     if w: parallel i in n: body, in a separate function
#     else: i in n: a call of that function
#
# so that the body is compiled once. The function is a compute scope of TVM: its LLVM code generator
# outlines the statement, with its free variables as arguments, in the order of `undefined_vars`. So
# this pass runs last, after all passes that may change them.


def outlined(function: PrimFunc, module: tvm.IRModule, context: object) -> PrimFunc:
    return function.with_body(_Outlining(str(function.attrs["global_symbol"])).of(function.body))


class _Outlining:
    """Outlines the statements of one function, and counts the new functions."""

    def __init__(self, name: str) -> None:
        self.name, self.tasks = name, 0

    def of(self, s: Stmt) -> Stmt:
        match s:
            case SeqStmt():
                return SeqStmt([self.of(part) for part in s.seq])
            case AttrStmt() if s.attr_key == WORTH:
                return self.choose_loop(s.value, s.body)
            case AttrStmt():
                return AttrStmt(s.node, s.attr_key, s.value, self.of(s.body))
            case IfThenElse():
                other = None if s.else_case is None else self.of(s.else_case)
                return IfThenElse(s.condition, self.of(s.then_case), other)
        return s

    def choose_loop(self, worth: tirx.Expr, loop: Stmt) -> Stmt:
        if isinstance(loop, SeqStmt):  # common subexpressions stand before the loop
            *before, loop = loop.seq
            return SeqStmt([*before, self.choose_loop(worth, loop)])
        if not isinstance(loop, For):  # it was simplified away
            return loop

        def make_for(kind: ForKind, var: Var, body: Stmt) -> For:
            return For(var, loop.min, loop.extent, kind, body)

        task, body = loop.loop_var, loop.body
        if isinstance(worth, tirx.IntImm):
            return make_for(ForKind.PARALLEL if worth.value else ForKind.SERIAL, task, body)
        self.tasks += 1
        name = f"{self.name}_task_{self.tasks}"
        cut = AttrStmt(tirx.const(0, "int32"), "compute_scope", StringImm(name), body)
        # Statements after a call need a location in the debug information, or LLVM refuses them.
        parallel = make_for(ForKind.PARALLEL, task, SeqStmt([cut, Evaluate(task)]))
        again = Var(task.name, task.ty)
        arguments = [again if v.same_as(task) else v for v in undefined_vars(body)]
        code = tirx.call_extern("int32", name, *arguments)
        fail = Evaluate(tirx.tvm_throw_last_error())
        serial = make_for(ForKind.SERIAL, again, IfThenElse(code != 0, fail, None))
        return IfThenElse(worth, parallel, serial)
