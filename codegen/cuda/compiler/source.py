"""Compiles kernels to CUDA C, and to the host functions that launch them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Var
from tvm.tirx import PrimFunc, TensorMapType

from moec.runtime.package import TENSOR_MAP, Launch
from moec.target.cuda import CudaTarget

# CUDA functions that generated loops call: memory access, rounding, comparison, exact math
# functions.
#
# They have the names of the CPU functions in `moec.codegen.cpu.llvm.scalar_text`, so that the same
# generated loops call either.

START = "// ---- functions of moec"
"""The comment before the functions in the CUDA C."""

_CALL = re.compile(r"\bmoec_\w+")
_HALVES = {"bf16": "nv_bfloat16", "f16": "half"}
_WIDTHS = (("32", "float", "f"), ("64", "double", ""))
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_MATH = {
    "exp": "expf(a)",
    "tanh": "tanhf(a)",
    "erf": "erff(a)",
    "sqrt": "sqrtf(a)",
    "fabs": "fabsf(a)",
    "floor": "floorf(a)",
    "ceil": "ceilf(a)",
    "trunc": "truncf(a)",
    "roundeven": "rintf(a)",
}

# TVM emits CUDA's fast, inexact functions for float32.
_FAST = re.compile(r"\b__(exp|exp10|log|log2|log10|sin|cos|tan|pow)f\b")

# TVM reads the bits of a float through the address of a value, which an rvalue does not have.
_BITS = re.compile(r"\*\((\w+) \*\)\(&\(")

_CAST = """template <class T, class F> static __forceinline__ __device__ T moec_bits(F from) {
  T to;
  static_assert(sizeof(T) == sizeof(F), "bits of one size");
  memcpy(&to, &from, sizeof(T));
  return to;
}"""

# NVRTC has no cuda.h, which declares the type of a tensor map: 128 bytes that only the driver
# reads.
_TENSOR_MAP = """
#ifdef __CUDACC_RTC__
  struct alignas(64) CUtensorMap_st { unsigned long long opaque[16]; };
  typedef CUtensorMap_st CUtensorMap;
#endif
"""

_HEADERS = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
"""


def with_functions(source: str) -> str:
    """The CUDA C with definitions of the moec functions it calls before its first kernel, and with
    exact functions in place of fast ones. Raises KeyError for an undefined function."""
    source = _FAST.sub(r"\1f", source)
    source = _BITS.sub(r"moec_bits<\1>((", source)
    if "CUtensorMap" in source:
        source = _TENSOR_MAP + source
    calls = sorted(set(_CALL.findall(source)))
    if not calls:
        return source
    start = source.index('extern "C" __global__')
    head, code = source[:start], source[start:]
    functions = "\n".join(_functions()[name] for name in calls)
    return f"{head}{_HEADERS}{START}\n{functions}\n{code}"


@cache
def _functions() -> dict[str, str]:
    """The definition of each function, by name."""
    text = {
        "moec_bits": _CAST,
        "moec_fma_f32": _f("float", "moec_fma_f32", "float a, float b, float c", "fmaf(a, b, c)"),
        "moec_zero_i64": _f("long long", "moec_zero_i64", "", "0"),
    }

    def add(kind: str, name: str, parameters: str, value: str) -> None:
        text[name] = _f(kind, name, parameters, value)

    for name, value in _MATH.items():
        add("float", f"moec_{name}_f32", "float a", value)
    for name, how in (("maximum", "fmaxf"), ("minimum", "fminf")):
        value = f"a != a ? a : b != b ? b : {how}(a, b)"
        add("float", f"moec_{name}_f32", "float a, float b", value)
    for width, kind, suffix in _WIDTHS:
        both = f"{kind} a, {kind} b"
        for name, sign in _COMPARISONS.items():
            add("int", f"moec_{name}_{width}", both, f"a {sign} b")
        add("int", f"moec_isnan_{width}", f"{kind} a", "a != a")
        add(kind, f"moec_from_i64_{width}", "long long a", f"({kind})a")
        add(kind, f"moec_fmod_{width}", both, f"fmod{suffix}(a, b)")
        add(kind, f"moec_mul_{width}", both, "a * b")
        add(kind, f"moec_reassociate_{width}", both, "a + b")
    for name, kind in _HALVES.items():
        add("float", f"moec_load_{name}", "const void* p", f"float(*(const {kind}*)p)")
        add("float", f"moec_round_{name}", "float x", f"float({kind}(x))")
        add("int", f"moec_store_{name}", "void* p, float x", f"(*({kind}*)p = {kind}(x), 0)")
    pair = "long long a, long long b"
    add("long long", "moec_divisor_i64", "long long b", "b == 0 ? 1 : b")
    add("long long", "moec_quotient_i64", pair, "a / (b < 1 ? 1 : b)")
    add("long long", "moec_rest_i64", pair, "a % (b < 1 ? 1 : b)")
    return text


def _f(kind: str, name: str, parameters: str, value: str) -> str:
    return f"static __forceinline__ __device__ {kind} {name}({parameters}) {{ return {value}; }}"


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
