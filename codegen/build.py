"""Relax, or kernels alone -> a library: memory planned by TVM, code made by LLVM."""

from __future__ import annotations

import re

import tvm
from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.tir_pipeline import PIPELINE
from moec.errors import IRError
from moec.target import Target


def compile_module(module: tvm.IRModule, target: Target, opt_level: int = 2) -> relax.VMExecutable:
    """The executable of a module that `lower` made."""
    made = _target(target, opt_level)
    with _context():
        built = relax.build(module, made, relax_pipeline=_pipeline(), tir_pipeline=PIPELINE)
    for part in (built.mod, *built.mod.imports):
        if part.kind == "llvm":
            _all_defined(part.inspect_source("ll"))
    return built


def compile_kernels(
    *kernels: PrimFunc, target: Target, opt_level: int = 2, checked: bool = False
) -> tvm.runtime.Executable:
    """Kernels by their names, as those of a module are compiled.

    They check the shapes of their arguments where they are `checked`.
    """
    module = tvm.IRModule({str(kernel.attrs["global_symbol"]): kernel for kernel in kernels})
    with _context(checked):
        return tvm.compile(module, _target(target, opt_level), tir_pipeline=PIPELINE)


def _target(target: Target, opt_level: int) -> tvm.target.Target:
    options = target.tvm()
    if opt_level == 0:
        options["opt-level"] = 0
    return tvm.target.Target(options)


def _context(checked: bool = False) -> tvm.transform.PassContext:
    """What TVM is to do with kernels, which check the shapes of their arguments where they are
    `checked`: those of `main` are checked where tensors enter it.

    Buffers have the sizes that they need; to look for smaller ones would take most of the time.
    """
    return tvm.transform.PassContext(
        opt_level=3,
        config={"tirx.disable_assert": not checked},
        disabled_pass=["s_tir.CompactBufferAllocation"],
    )


def _all_defined(text: str) -> None:
    """A function of ours that is only declared would end the process that loads the library."""
    lost = sorted(set(re.findall(r"^declare .*@(moec_\w+)", text, re.MULTILINE)))
    if lost:
        raise IRError(f"kernels call {', '.join(lost)}, which nothing defines")


def _pipeline() -> tvm.transform.Pass:
    """What is left to do for a module in which every call is a kernel already."""
    t = relax.transform
    return tvm.transform.Sequential(
        [
            t.DeadCodeElimination(),
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
