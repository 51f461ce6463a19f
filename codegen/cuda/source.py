"""A kernel -> its CUDA C, and the host function that launches it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import tvm
from tvm import tirx
from tvm.tirx import PrimFunc

from moec.codegen.cuda.pipeline import PIPELINE
from moec.target.cuda import CudaTarget

_build = importlib.import_module("tvm.tirx.build")  # tvm.tirx.build is a function


@dataclass(frozen=True)
class Lowered:
    """`source` is CUDA C; `device` are its kernels after all passes, whose attributes give the
    launch, and `host` what launches them."""

    source: str
    device: tvm.IRModule
    host: tvm.IRModule


def lowered(kernel: PrimFunc, target: CudaTarget) -> Lowered:
    """The CUDA C of a kernel. Needs neither CUDA nor a GPU."""
    name = str(kernel.attrs["global_symbol"])
    options = tvm.target.Target(target.tvm(), host="llvm")
    module = tirx.transform.BindTarget(options)(tvm.IRModule({name: kernel}))
    passes, finish_host, finish_device = tirx.get_tir_pipeline(PIPELINE)
    host, devices = _build.split_host_device_mods(passes(module))
    ((device_target, device),) = devices.items()
    device = finish_device()(device)
    with options:
        source = str(_build.codegen_build(device, device_target).inspect_source("cuda"))
    return Lowered(source, device, finish_host()(host))


def launcher(lowered: Lowered) -> tvm.runtime.Module:
    """The host function in machine code. It takes its kernels from the module imported into it,
    and any device that tensors lie on."""
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return _build.codegen_build(lowered.host, tvm.target.Target("llvm"))
