"""CUDA functions that generated loops call: memory access, rounding, comparison, exact math
functions.

They have the names of the CPU functions in `moec.codegen.cpu.llvm.scalar_text`, so that the same
generated loops call either.
"""

from __future__ import annotations

import re
from functools import cache

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
