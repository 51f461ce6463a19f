"""A kernel's frame imports the LLVM functions that the kernel calls, and no others."""

from __future__ import annotations

import re

import pytest
from tvm.ir import StringImm
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc
from tvm_ffi.structural import structural_walk

from moec.codegen.cpu.frame import IMPORT, argument, kernel
from moec.codegen.cpu.llvm.library import library
from moec.codegen.cpu.vector import Vector
from moec.errors import IRError
from moec.target.cpu import TARGETS, CpuTarget

TARGET = TARGETS["avx2"]


def calling(name: str, target: CpuTarget | None = TARGET) -> PrimFunc:
    """y[0] = name(y[0])"""
    with kernel("f", target) as frame:
        y = argument("y", (1,), "float32")
        T.buffer_store(y, T.call_extern("float32", name, y[0]), [0])
    return frame.function


def imported(function: PrimFunc) -> list[str]:
    """The names of what LLVM text in the function defines or declares."""
    texts: list[str] = []
    structural_walk(function.body, (StringImm, lambda string: texts.append(string.value)))
    matches = re.findall(r"^(?:define|declare)[^@]*@([\w.]+)", "\n".join(texts), re.MULTILINE)
    return sorted(matches)


def test_what_is_called_comes_with_all_that_it_calls() -> None:
    assert imported(calling("moec_exp_f32")) == ["llvm.fma.f32", "moec_exp_f32", "moec_fma_f32"]
    v = Vector(TARGET)
    with kernel("f", TARGET) as frame:
        y = argument("y", (8,), "float32")
        v.store(y, [0], v.fma(v.load(y, [0]), v.splat(2.0), v.splat(1.0)))
    assert imported(frame.function) == [
        "llvm.fma.v8f32",
        "moec_fma_8",
        "moec_load_float32_8",
        "moec_store_float32_8",
    ]


def test_a_kernel_that_calls_nothing_imports_nothing() -> None:
    with kernel("f") as frame:
        T.buffer_store(argument("y", (1,), "float32"), T.float32(1), [0])
    assert IMPORT not in frame.function.script()


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("moec_exp_16", TARGET, "f calls moec_exp_16, which avx2 does not have"),
        ("moec_exp_f32", None, "f calls moec_exp_f32, and has no target"),
    ],
)
def test_a_function_that_nothing_defines(name: str, target: CpuTarget | None, words: str) -> None:
    with pytest.raises(IRError, match=words):
        calling(name, target)


@pytest.mark.parametrize("name", TARGETS)
def test_the_library_of_a_target_is_complete(name: str) -> None:
    """Whatever a function names is in the library too."""
    functions = library(TARGETS[name])
    assert len(functions.entities) > 100
    assert functions.text(functions.entities) == "\n".join(functions.entities.values())
