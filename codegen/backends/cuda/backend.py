"""The backend for NVIDIA GPUs: kernels for MoE layers, and loops over a grid for all other ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tvm import IRModule

from moec.cache import Store
from moec.codegen.backend import Backend
from moec.codegen.backends.cuda import attention, products, quantised, routing
from moec.codegen.backends.cuda.library import launched
from moec.codegen.backends.cuda.loops import write
from moec.codegen.cpu.link import linker_for
from moec.codegen.cuda.append import append
from moec.codegen.cuda.compiler.cubin import compiler, machine_code
from moec.codegen.cuda.norm import norm
from moec.codegen.cuda.routing.combine import combine
from moec.codegen.cuda.routing.dispatch import dispatch
from moec.codegen.cuda.routing.route import route
from moec.codegen.rules import caches, experts, norms, sizes
from moec.codegen.specs.attention import AppendSpec
from moec.codegen.specs.norm import NormSpec
from moec.codegen.specs.routing import CombineSpec, DispatchSpec, RouteSpec
from moec.runtime.package import HOST_CODE, SOURCE, BuiltLibrary, GpuCode
from moec.target.cuda import HOST, CudaTarget


def _text(
    modules: Mapping[str, IRModule], target: CudaTarget, opt_level: int, store: Store | None
) -> BuiltLibrary:
    codes = {part.arch: launched(modules[part.name], part, store) for part in target.parts}
    launches = {arch: code.kernels.launches for arch, code in codes.items()}
    texts = {f"{arch}{SOURCE}": code.kernels.source.encode() for arch, code in codes.items()}
    hosts = {f"{arch}{HOST_CODE}": code.host for arch, code in codes.items()}
    return BuiltLibrary(gpu=GpuCode(target.name, launches, texts | hosts))


def _library(
    modules: Mapping[str, IRModule], target: CudaTarget, opt_level: int, store: Store | None
) -> BuiltLibrary:
    gpu = _text(modules, target, opt_level, store).gpu
    assert gpu is not None
    sources = {arch: gpu.parts[f"{arch}{SOURCE}"].decode() for arch in gpu.launches}
    parts = {**gpu.parts, **machine_code(sources, target, store)}
    return BuiltLibrary(gpu=replace(gpu, parts=parts, toolkit=compiler(target).version))


def _ready(target: CudaTarget) -> None:
    linker_for(HOST)
    compiler(target)


CUDA = Backend(
    kind="cuda",
    rules=(
        *products.RULES,
        *quantised.RULES,
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
    parts=lambda target: target.parts,
    destinations=True,
)

CUDA_TEXT = replace(CUDA, library=_text, ready=lambda target: linker_for(HOST))
"""Like CUDA, but stops at the CUDA C of the kernels: for a machine without nvcc and NVRTC."""
