"""The backend for NVIDIA GPUs: kernels for MoE layers, and loops over a grid for all other ops."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import tvm
from tvm import IRModule

from moec.cache import OBJECTS, Store, default_store, key_of, load, save
from moec.codegen.backend import Backend
from moec.codegen.backends.cuda import attention, products, quantised, routing
from moec.codegen.backends.cuda.loops import write
from moec.codegen.build import Objects, context, executable, lowered_calls, options_of
from moec.codegen.cpu.link import linked, linker_for
from moec.codegen.cuda.append import append
from moec.codegen.cuda.compiler import nvcc, nvrtc
from moec.codegen.cuda.compiler.source import Lowered, launcher, lowered
from moec.codegen.cuda.norm import norm
from moec.codegen.cuda.routing.dispatch import combine, dispatch
from moec.codegen.cuda.routing.route import route
from moec.codegen.object_cache import compiled_objects, contents_of
from moec.codegen.rules import caches, experts, norms, sizes
from moec.codegen.specs.attention import AppendSpec
from moec.codegen.specs.norm import NormSpec
from moec.codegen.specs.routing import CombineSpec, DispatchSpec, RouteSpec
from moec.errors import TargetError
from moec.runtime.package import CUBIN, HOST_CODE, PTX, SOURCE, BuiltLibrary, GpuCode
from moec.runtime.process.threads import available
from moec.target import nvidia
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


# Relax and CUDA kernels -> a host library, and the CUDA C of the kernels that it launches.
#
# The host library is CPU machine code: it calls kernels, plans memory and computes sizes. It
# contains no kernels; it finds them by name in the module that is imported into it when it is
# loaded.
@dataclass(frozen=True)
class Launched:
    """`host` is a shared library; `kernels` are the kernels that it launches."""

    host: bytes
    kernels: Lowered


def launched(module: tvm.IRModule, target: CudaTarget, store: Store | None = None) -> Launched:
    """The code of a module from `lower`. Needs a C linker, but neither CUDA nor a GPU.

    Raises TargetError if there is no linker.
    """
    options = options_of(HOST, 2)
    with context(), options:
        functions, frame = executable(lowered_calls(module), options)
        # Functions that compute sizes run on the host; all others are kernels.
        sizes = {n: f for n, f in functions.items() if "tirx.is_host_func" in f.attrs}
        kernels = [f for n, f in functions.items() if n not in sizes]
        store = store or default_store()
        objects = compiled_objects(sizes, contents_of(sizes), options, store, checked=False)
    low = lowered(*kernels, target=target)
    parts = (*objects.values(), _object(launcher(low)))
    return Launched(linked(Objects(parts, frame, HOST), HOST), low)


def _object(module: tvm.runtime.Module) -> bytes:
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = Path(folder) / "launch.o"
        module.write_to_file(str(path))
        return path.read_bytes()


_COMPILERS = {nvidia.NVCC: nvcc, nvidia.NVRTC: nvrtc}


@dataclass(frozen=True)
class Cubin:
    """Machine code, and the resources that ptxas reports: registers per thread, bytes of spilled
    registers, bytes of static shared memory. For several kernels, each is the maximum."""

    content: bytes
    registers: int
    spills: int
    static_shared: int


def compiler(target: CudaTarget) -> nvidia.Compiler:
    """nvcc if it is installed, otherwise NVRTC. Raises TargetError if neither is."""
    chosen = nvidia.nvcc() or nvidia.nvrtc()
    if chosen is None:
        raise TargetError(
            f"target {target.name!r}: there is neither nvcc nor NVRTC, and one of them must "
            "compile its kernels: pip install 'moec[cuda]', or install the CUDA toolkit and set "
            "CUDA_HOME or PATH to it"
        )
    return chosen


def machine_code(
    sources: Mapping[str, str], target: CudaTarget, store: Store | None = None
) -> dict[str, bytes]:
    """From the CUDA C of each part of a target: the cubin of each architecture, and the PTX of the
    last part, by their names in an artifact. `store` caches them; None means the user's store.

    Raises TargetError if there is no compiler, or if it fails.
    """
    chosen, store, last = compiler(target), store or default_store(), target.parts[-1].arch
    jobs = {f"{arch}{CUBIN}": (sources[arch], arch) for arch in target.archs}
    jobs[f"{last}{PTX}"] = sources[last], last.replace("sm_", nvidia.VIRTUAL)

    def compiled(job: tuple[str, str]) -> bytes:
        return _cubin(*job, chosen, store).content

    with ThreadPoolExecutor(available()) as pool:
        return dict(zip(jobs, pool.map(compiled, jobs.values()), strict=True))


def cubin(source: str, target: CudaTarget, store: Store | None = None) -> Cubin:
    """The cubin for the oldest architecture of a target; see `machine_code`."""
    return _cubin(source, target.arch, compiler(target), store or default_store())


def _cubin(source: str, arch: str, chosen: nvidia.Compiler, store: Store) -> Cubin:
    by = _COMPILERS[chosen.name]
    key = key_of("cubin", source, arch, chosen.name, chosen.version, *by.FLAGS)
    log_key = key_of("ptxas", key)
    content, log = load(store, OBJECTS, key), load(store, OBJECTS, log_key)
    if content is None or log is None:
        content, log = by.compiled(source, arch, chosen)
        save(store, OBJECTS, {key: content, log_key: log})
    text = log.decode(errors="replace")
    return Cubin(
        content,
        _most(r"Used (\d+) registers", text),
        _most(r"(\d+) bytes spill stores", text) + _most(r"(\d+) bytes spill loads", text),
        _most(r"(\d+) bytes smem", text),
    )


def _most(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)
