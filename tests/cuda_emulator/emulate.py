"""Emulates CUDA kernels on the CPU: CUDA C is compiled as C++ and run under its real host code.

    kernel --TVM--> CUDA C --g++ with kernel.hpp--> library --imported by--> TVM's host function

So grids, shared memory and the order of arguments are those of a real launch. A page without access
follows each tensor: a read or write beyond the end is an EmulationError, and so are deadlocks and
divergent warps. docs/cuda.md lists what is not emulated.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import shutil
import struct
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
import tvm_ffi
from torch import Tensor
from tvm.tirx import PrimFunc

from moec.cache import LIBRARIES, default_store, key_of, load, save
from moec.codegen.cuda.compiler.source import START, launcher, lowered
from moec.runtime.package import Launch
from moec.target.cuda import TARGETS, CudaTarget

HEADERS = tuple(sorted(Path(__file__).parent.glob("*.hpp")))
SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
LARGE = 1 << 19
"""Characters of CUDA C from which g++ takes longer to optimise it than it runs: whole models."""
FLAGS = (
    *("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w"),
    "-fvisibility=hidden",
    *("-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables"),  # a seventh of the time
)
VISIBLE = '__attribute__((visibility("default")))'
SM_80 = TARGETS["cuda:sm_80"]


def _encode(
    encoded: Any,
    dtype: object,
    rank: int,
    base: Any,
    columns: int,
    rows: int,
    stride: int,
    box_columns: int,
    box_rows: int,
    *options: int,
) -> int:
    """What the driver would encode, as the CUtensorMap of sm_90a.hpp: matrices of 16 bits."""
    swizzle = options[3]
    values = (base.value, columns, rows, stride, box_columns, box_rows, 2, swizzle)
    ctypes.memmove(encoded.value, struct.pack("<8q", *values), 64)
    return 0


tvm_ffi.register_global_func("__tvm_set_device", lambda *_: None, override=True)
tvm_ffi.register_global_func("runtime.cuTensorMapEncodeTiled", _encode, override=True)


class EmulationError(Exception):
    """The kernel does what a GPU would not let pass, or would never end."""


@dataclass(frozen=True)
class Schedule:
    """`late`: copies happen when they are waited for, else at once. `skewed`: one warp runs until
    it is stuck before another moves, else all in turn."""

    late: bool
    skewed: bool

    def __str__(self) -> str:
        return f"{'late' if self.late else 'early'}{'-skewed' if self.skewed else ''}"


SCHEDULES = tuple(itertools.starmap(Schedule, itertools.product((True, False), (False, True))))
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@dataclass(frozen=True)
class Emulated:
    """A kernel that takes torch tensors of the CPU, the results last."""

    host: tvm.runtime.Module
    library: ctypes.CDLL
    name: str

    def __call__(self, *tensors: Tensor, schedule: Schedule = SCHEDULES[0]) -> None:
        """Raises EmulationError; results are undefined then."""
        self.library.emulator_schedule(schedule.late, schedule.skewed)
        copies = [_guarded(t) for t in tensors]
        self.host[self.name](*map(_argument, copies))
        if message := self.library.emulator_message().decode():
            raise EmulationError(message)
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)


def emulated(
    kernel: PrimFunc, target: CudaTarget = SM_80, change: Callable[[str], str] = str
) -> Emulated:
    """The kernel as it is compiled for `target`; `change` edits its CUDA C: a bug, planted.

    Raises EmulationError where it uses an instruction that the emulator does not have.
    """
    low = lowered(kernel, target=target)
    host = launcher(low)
    library = imported(host, change(low.source), low.launches)
    return Emulated(host, library, str(kernel.attrs["global_symbol"]))


def imported(host: Any, source: str, launches: Sequence[Launch]) -> ctypes.CDLL:
    """The emulated kernels, after `host` imported them: it launches them from now on."""
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = Path(folder, "kernels.so")
        path.write_bytes(compiled_kernels(source, launches))
        host.import_module(tvm.runtime.load_module(str(path)))
        library = ctypes.CDLL(str(path))
    library.emulator_message.restype = ctypes.c_char_p
    return library


def compiled_kernels(source: str, launches: Sequence[Launch]) -> bytes:
    """A shared library with the kernels of CUDA C, emulated."""
    return _compiled(_cpp(source, launches))


# ---- CUDA C as C++ ---------------------------------------------------------------------


def _cpp(source: str, launches: Sequence[Launch]) -> str:
    start = START if START in source else 'extern "C" __global__'
    code = source[source.index(start) :]
    dynamic = r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];"
    code = re.sub(dynamic, r"\1* \2 = (\1*)emulator::dynamic_memory;", code)
    section = r'static __attribute__((section("block_memory"), aligned(\1))) '
    code = re.sub(r"__shared__ alignas\((\d+)\) ", section, code)
    entries = [_entry(code, launch) for launch in launches]
    return "\n".join(['#include "kernel.hpp"', code, *entries])


def _entry(code: str, launch: Launch) -> str:
    """The functions that TVM's host code calls, with arguments and the sizes of the launch by tag,
    and those that the fake driver calls (tests/cuda_emulator/driver.c)."""
    name = launch.name
    signature = re.search(rf"\b{name}\((.*?)\)(?:;| \{{)", code)
    assert signature is not None
    words = r"__restrict__|__grid_constant__|const|\w+$"
    kinds = [re.sub(words, "", p).strip() for p in signature[1].split(", ")]
    sizes = {tag: f"int(a[{len(kinds) + i}].i)" for i, tag in enumerate(launch.sizes)}
    arguments = [_argument_of(kind, i) for i, kind in enumerate(kinds)]
    grid, threads = (
        ", ".join(sizes.get(f"{of}.{axis}", "1") for axis in "xyz")
        for of in ("blockIdx", "threadIdx")
    )
    dynamic = sizes.get("tirx.use_dyn_shared_memory", "0")
    values = ", ".join(f"*({kind}*)p[{i}]" for i, kind in enumerate(kinds))
    widths = ", ".join(f"sizeof({kind})" for kind in kinds)
    return f"""
extern "C" {VISIBLE} const int widths_{name}[] = {{{widths}, 0}};
extern "C" {VISIBLE} void launch_{name}(void** p, const int* g, int dynamic) {{
  emulator::launch({{g[0], g[1], g[2]}}, {{g[3], g[4], g[5]}}, dynamic,
                   [=] {{ {name}({values}); }});
}}
extern "C" {VISIBLE} int __tvm_ffi_{name}(void*, const Argument* a, int, Argument* result) {{
  emulator::launch({{{grid}}}, {{{threads}}}, {dynamic}, [=] {{ {name}({", ".join(arguments)}); }});
  *result = {{}};
  return 0;
}}"""


def _argument_of(kind: str, index: int) -> str:
    if kind == "CUtensorMap":
        return f"*(CUtensorMap*)a[{index}].p"
    field = "p" if "*" in kind else "d" if kind in ("float", "double") else "i"
    return f"({kind})a[{index}].{field}"


def _compiled(code: str) -> bytes:
    store = default_store()
    emulator = [path.read_text() for path in (*HEADERS, *SOURCES)]
    level = "-O0" if len(code) > LARGE else "-O1"
    key = key_of("emulated", code, *emulator, level, *FLAGS)
    if (library := load(store, LIBRARIES, key)) is not None:
        return library
    if shutil.which("g++") is None:
        pytest.skip("no g++, which compiles CUDA C for the emulator")
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        source, output = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(code)
        objects = [str(path) for path in Path(_objects()).glob("*.o")]
        words = ["g++", level, *FLAGS, "-shared", f"-I{_precompiled(level)}"]
        command = [*words, str(source), *objects, "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error:" in line]
            raise EmulationError("\n".join(lines) or result.stderr)
        library = output.read_bytes()
    save(store, LIBRARIES, {key: library})
    return library


@cache
def _precompiled(level: str) -> str:
    """A folder with the headers, compiled once for a level of optimisation."""
    folder = _folder()
    for header in HEADERS:
        shutil.copy(header, folder)
    path = Path(folder, "kernel.hpp")
    words = ["g++", level, *FLAGS, "-x", "c++-header", str(path), "-o", f"{path}.gch"]
    subprocess.run(words, check=True)
    return folder


@cache
def _objects() -> str:
    """A folder with the emulator itself, compiled once, which is linked to each kernel."""
    folder = _folder()
    subprocess.run(["g++", "-O1", *FLAGS, "-c", *map(str, SOURCES)], check=True, cwd=folder)
    return folder


def _folder() -> str:
    """A folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="moec-emulator-")
    weakref.finalize(_compiled, shutil.rmtree, folder, ignore_errors=True)
    return folder


# ---- tensors that end where a page without access begins ---------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0


def _guarded(tensor: Tensor) -> Tensor:
    """A copy of it, behind which nothing may be read or written."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor.contiguous()
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = ctypes.c_void_p(address + usable)
    if _LIBC.mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=usable - size)
    return copy.reshape(tensor.shape).copy_(tensor)


def _argument(tensor: Tensor) -> Any:
    """Torch gives empty tensors strides that TVM takes for a gap."""
    if tensor.numel():
        return tvm_ffi.from_dlpack(tensor)
    return tvm.runtime.empty(tensor.shape, str(tensor.dtype).removeprefix("torch."))
