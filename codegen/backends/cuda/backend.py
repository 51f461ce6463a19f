"""The backend for NVIDIA GPUs: kernels for MoE layers, and loops over a grid for all other ops."""

from __future__ import annotations

from dataclasses import replace

from tvm import IRModule

from moec.cache import Store
from moec.codegen.backend import Backend
from moec.codegen.backends.cuda import attention, compressed, products, quantised, routing
from moec.codegen.backends.cuda.library import launched
from moec.codegen.backends.cuda.loops import write
from moec.codegen.cpu.link import linker_for
from moec.codegen.cuda.append import append
from moec.codegen.cuda.compiler.cubin import compiler, cubins
from moec.codegen.cuda.compiler.source import PART
from moec.codegen.cuda.norm import norm
from moec.codegen.cuda.routing.combine import combine
from moec.codegen.cuda.routing.dispatch import dispatch
from moec.codegen.cuda.routing.route import route
from moec.codegen.rules import caches, experts, norms, sizes
from moec.codegen.specs.attention import AppendSpec
from moec.codegen.specs.norm import NormSpec
from moec.codegen.specs.routing import CombineSpec, DispatchSpec, RouteSpec
from moec.runtime.package import BuiltLibrary, GpuCode
from moec.target.cuda import HOST, CudaTarget


def _text(
    module: IRModule, target: CudaTarget, opt_level: int, store: Store | None
) -> BuiltLibrary:
    code = launched(module, target, store)
    parts = {PART: code.kernels.source.encode()}
    return BuiltLibrary(code.host, GpuCode(target.name, code.kernels.launches, parts))


def _library(
    module: IRModule, target: CudaTarget, opt_level: int, store: Store | None
) -> BuiltLibrary:
    text = _text(module, target, opt_level, store)
    assert text.gpu is not None
    by_arch = cubins(text.gpu.parts[PART].decode(), target, store)
    parts = {f"{arch}.cubin": cubin.content for arch, cubin in by_arch.items()}
    toolkit = compiler(target).version
    return replace(text, gpu=replace(text.gpu, parts={**text.gpu.parts, **parts}, toolkit=toolkit))


def _ready(target: CudaTarget) -> None:
    linker_for(HOST)
    compiler(target)


CUDA = Backend(
    kind="cuda",
    rules=(
        *products.RULES,
        *quantised.RULES,
        *compressed.RULES,
        *routing.RULES,
        *attention.RULES,
        *caches.RULES,
        *experts.RULES,
        *norms.RULES,
        *sizes.RULES,
    ),
    kernels={
        AppendSpec: append,
        CombineSpec: combine,
        DispatchSpec: dispatch,
        NormSpec: norm,
        RouteSpec: route,
    },
    loop=write,
    library=_library,
    ready=_ready,
    destinations=True,
)

CUDA_TEXT = replace(CUDA, library=_text, ready=lambda target: linker_for(HOST))
"""Like CUDA, but stops at the CUDA C of the kernels: for a machine without nvcc and NVRTC."""
