"""Relax -> a shared library: memory planned by TVM, code made by LLVM."""

from __future__ import annotations

import tvm
from tvm import relax

from moec.target import Target


def compile_module(module: tvm.IRModule, target: Target, opt_level: int = 2) -> relax.VMExecutable:
    """The executable of a module that `lower` made."""
    options = target.tvm()
    if opt_level == 0:
        options["opt-level"] = 0
    made = tvm.target.Target(options)
    # Shapes are checked where tensors enter `main`; kernels need not check them again.
    with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": True}):
        return relax.build(module, made, relax_pipeline=_pipeline(), tir_pipeline="default")


def _pipeline() -> tvm.transform.Pass:
    """What is left to do for a module in which every call is a kernel already."""
    t = relax.transform
    return tvm.transform.Sequential(
        [
            t.ToNonDataflow(),
            t.RemovePurityChecking(),
            t.CallTIRRewrite(),
            t.StaticPlanBlockMemory(),
            t.LowerAllocTensor(),
            t.KillAfterLastUse(),
            t.LowerRuntimeBuiltin(),
            t.ComputePrimValue(),
            t.VMShapeLower(),
            t.AttachGlobalSymbol(),
        ]
    )
