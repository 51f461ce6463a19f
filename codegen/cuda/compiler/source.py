"""Compiles kernels to CUDA C, and to the host functions that launch them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Var
from tvm.tirx import PrimFunc, TensorMapType

from moec.codegen.cuda.functions import with_functions
from moec.runtime.package import TENSOR_MAP, Launch
from moec.target.cuda import CudaTarget

_build = importlib.import_module("tvm.tirx.build")  # tvm.tirx.build is a function

_COMPILE = "tvm_callback_cuda_compile"


@dataclass(frozen=True)
class Lowered:
    """`source` is CUDA C. `device` are the kernels after all passes, with the launch parameters as
    attributes; `host` are the functions that launch them."""

    source: str
    device: tvm.IRModule
    host: tvm.IRModule

    @property
    def launches(self) -> tuple[Launch, ...]:
        """The launches with which a module of these kernels is opened."""
        return tuple(_launch(v.name_hint, f) for v, f in self.device.functions.items())


def _launch(name: str, kernel: PrimFunc) -> Launch:
    arguments = tuple(_type(parameter) for parameter in kernel.params)
    return Launch(str(name), arguments, tuple(map(str, kernel.attrs["tirx.kernel_launch_params"])))


def _type(parameter: Var) -> str:
    if isinstance(getattr(parameter.ty, "element_type", None), TensorMapType):
        return TENSOR_MAP
    dtype = getattr(parameter.ty, "dtype", None)
    return "handle" if dtype is None else str(dtype)


def lowered(*kernels: PrimFunc, target: CudaTarget) -> Lowered:
    """The CUDA C of kernels. Needs neither CUDA nor a GPU."""
    named = {str(kernel.attrs["global_symbol"]): kernel for kernel in kernels}
    options = tvm.target.Target(target.tvm(), host="llvm")
    module = tirx.transform.BindTarget(options)(tvm.IRModule(named))
    passes, finish_host, finish_device = tirx.get_tir_pipeline(PIPELINE)
    host, devices = _build.split_host_device_mods(passes(module))
    ((device_target, device),) = devices.items()
    device = finish_device()(device)
    with options, _left_as_source():
        source = str(_build.codegen_build(device, device_target).inspect_source("cuda"))
    return Lowered(with_functions(_one_memory(source)), device, finish_host()(host))


def _one_memory(source: str) -> str:
    """Kernels of one source must declare dynamic shared memory alike; TVM declares it with the type
    of each kernel's elements, under names that may be the same."""
    declared = r"extern __shared__ __align__\((\d+)\) (\w+) (\w+)\[\];"
    most = max((int(match[1]) for match in re.finditer(declared, source)), default=0)
    shared = f"extern __shared__ __align__({most}) uchar dynamic_shared[];"
    return re.sub(declared, rf"{shared} \2* \3 = (\2*)dynamic_shared;", source)


@contextmanager
def _left_as_source() -> Iterator[None]:
    """Keeps TVM from compiling the CUDA C. If there is a GPU, TVM would compile it with its own
    options and a package that may be missing. `backend` compiles the text
    instead."""
    compile = tvm.get_global_func(_COMPILE)
    tvm_ffi.register_global_func(_COMPILE, lambda code: code.encode(), override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(_COMPILE, compile, override=True)


def launcher(lowered: Lowered) -> tvm.runtime.Module:
    """The host functions as machine code. They call the kernels of the module imported into them,
    on the device of their tensors."""
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return _build.codegen_build(lowered.host, tvm.target.Target("llvm"))


# ---- TVM's pass pipeline for kernels that manage barriers and shared memory themselves ---
# The default pipeline inserts barriers, moves buffers, and fails on a shared load inside a
# condition. So ThreadSync, StorageRewrite and HoistIfThenElse are left out. Loops marked to be
# unrolled stay loops (`#pragma unroll`): nvcc unrolls them, in less time than TVM.


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
