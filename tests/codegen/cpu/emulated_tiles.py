"""The int8 products of AMX's tile registers, emulated on CPUs with AVX512-VNNI.

Registers are memory, and instructions are LLVM functions that follow the manual. All code runs on
the calling thread: the products of the tests are too small for several threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from moec.codegen.cpu.llvm import vector_text
from moec.codegen.cpu.llvm.amx import TILE_ROWS, tile_functions
from moec.target.cpu import TARGETS

_DOTS = TARGETS["avx512-bf16"]
EMULATED = replace(
    TARGETS["amx"], name="emulated amx", mattr=_DOTS.mattr, features=TARGETS["amx"].features
)
"""Compiled without a word of AMX."""
_V, _T = "<16 x i32>", f"[{TILE_ROWS} x <16 x i32>]"


@contextmanager
def emulated() -> Iterator[None]:
    """Kernels for EMULATED must be made inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_text, "tile_functions", _functions)
        yield


def _functions() -> str:
    text = re.sub(r"declare void @llvm\.x86\..*\n", "", tile_functions())
    private = [_EMULATED, _moved("tileloadd64", load=True), _moved("tilestored64", load=False)]
    private += [_product("tdpbsud", 0), _product("tdpbssd", -0x7F7F7F80)]
    return "\n".join([text.replace("@llvm.x86.", "@moec_emulated_"), *private])


def _row(name: str, register: str, row: int | str) -> str:
    return (
        f"  %{name} = getelementptr [8 x {_T}], ptr @moec_tiles, i64 0, i8 {register}, i64 {row}\n"
    )


def _moved(name: str, load: bool) -> str:
    body = ""
    for r in range(TILE_ROWS):
        memory = f"%m{r}"
        body += (
            f"  %o{r} = mul i64 %stride, {r}\n  {memory} = getelementptr i8, ptr %p, i64 %o{r}\n"
        )
        body += _row(f"t{r}", "%t", r)
        source, to = (memory, f"%t{r}") if load else (f"%t{r}", memory)
        body += f"  %v{r} = load {_V}, ptr {source}, align 1\n"
        body += f"  store {_V} %v{r}, ptr {to}, align 1\n"
    return f"""
define linkonce_odr void @moec_emulated_{name}(i8 %t, ptr %p, i64 %stride) {{
{body}  ret void
}}"""


def _product(name: str, more: int) -> str:
    """c += a @ b of signed bytes of a and of unsigned ones of b; signed ones become unsigned by
    adding `more` to each lane, 128 to each byte, and what that added is taken away."""
    splat = "<" + ", ".join([f"i32 {more}"] * 16) + ">"
    body = ""
    for k in range(16):
        acc = "%acc" if not k else f"%d{k - 1}"
        body += _row(f"bp{k}", "%b", k)
        body += f"""  %ap{k} = getelementptr i32, ptr %ap, i64 {k}
  %x{k} = load i32, ptr %ap{k}
  %y{k} = insertelement {_V} poison, i32 %x{k}, i32 0
  %z{k} = shufflevector {_V} %y{k}, {_V} poison, {_V} zeroinitializer
  %w{k} = load {_V}, ptr %bp{k}
  %u{k} = xor {_V} %w{k}, {splat}
  %zb{k} = bitcast {_V} %z{k} to <64 x i8>
  %ub{k} = bitcast {_V} %u{k} to <64 x i8>
  %mb{k} = bitcast {_V} {splat} to <64 x i8>
  %e{k} = call {_V} {_DOT}({_V} {acc}, <64 x i8> %ub{k}, <64 x i8> %zb{k})
  %m{k} = call {_V} {_DOT}({_V} zeroinitializer, <64 x i8> %mb{k}, <64 x i8> %zb{k})
  %d{k} = sub {_V} %e{k}, %m{k}
"""
    return f"""
define linkonce_odr void @moec_emulated_{name}(i8 %c, i8 %a, i8 %b) {{
start:
  br label %row
row:
  %r = phi i64 [ 0, %start ], [ %next, %row ]
{_row("cp", "%c", "%r")}{_row("ap", "%a", "%r")}  %acc = load {_V}, ptr %cp
{body}  store {_V} %d15, ptr %cp
  %next = add i64 %r, 1
  %more = icmp ult i64 %next, {TILE_ROWS}
  br i1 %more, label %row, label %end
end:
  ret void
}}"""


_DOT = "@llvm.x86.avx512.vpdpbusd.512"  # declared by quantised/integers.py
_EMULATED = f"""
@moec_tiles = linkonce_odr global [8 x {_T}] zeroinitializer, align 64
declare void @moec_emulated_tdpbf16ps(i8, i8, i8)
define linkonce_odr void @moec_emulated_ldtilecfg(ptr %p) {{
  ret void
}}
define linkonce_odr void @moec_emulated_tilerelease() {{
  ret void
}}
define linkonce_odr void @moec_emulated_tilezero(i8 %t) {{
{_row("p", "%t", 0)}  store {_T} zeroinitializer, ptr %p
  ret void
}}"""
