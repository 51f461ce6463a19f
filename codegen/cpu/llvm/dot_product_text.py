"""LLVM functions that multiply bytes; quantised/dot_products.py documents them."""

from __future__ import annotations

from moec.codegen.cpu.llvm.constants import splat
from moec.codegen.cpu.llvm.pair_sums import pair_sums
from moec.target.cpu import CpuTarget


def dot_product_functions(target: CpuTarget) -> str:
    return dot4(target) + (_small(target) if target.byte_pairs else "")


def dot4(target: CpuTarget) -> str:
    n = target.vector_lanes
    i = f"<{n} x i32>"
    head = f"define linkonce_odr {i} @moec_dot4_{n}({i} %acc, {i} %a, {i} %b) alwaysinline {{"
    if target.int8_dot:
        bytes_ = f"<{4 * n} x i8>"
        arm = "sdot" if target.int8_signed else "usdot"
        dot = {
            16: "@llvm.x86.avx512.vpdpbusd.512",
            8: "@llvm.x86.avx512.vpdpbusd.256",
            4: f"@llvm.aarch64.neon.{arm}.v4i32.v16i8",
        }[n]
        return f"""
declare {i} {dot}({i}, {bytes_}, {bytes_})
{head}
  %x = bitcast {i} %a to {bytes_}
  %y = bitcast {i} %b to {bytes_}
  %r = call {i} {dot}({i} %acc, {bytes_} %x, {bytes_} %y)
  ret {i} %r
}}
"""
    h = f"<{2 * n} x i16>"
    eight, mask = splat(2 * n, "i16", "8"), splat(2 * n, "i16", "255")
    return f"""
{head}
  %x = bitcast {i} %a to {h}
  %y = bitcast {i} %b to {h}
  %xl = and {h} %x, {mask}
  %xh = lshr {h} %x, {eight}
  %ys = shl {h} %y, {eight}
  %yl = ashr {h} %ys, {eight}
  %yh = ashr {h} %y, {eight}{pair_sums(n, "l", "%xl", "%yl")}{pair_sums(n, "h", "%xh", "%yh")}
  %s = add {i} %l, %h
  %r = add {i} %acc, %s
  ret {i} %r
}}
"""


def _small(target: CpuTarget) -> str:
    n = target.vector_lanes
    i, h, b = f"<{n} x i32>", f"<{2 * n} x i16>", f"<{4 * n} x i8>"
    of_bytes = {8: "avx2.pmadd.ub.sw", 16: "avx512.pmaddubs.w.512"}[n]
    of_pairs = {8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[n]
    return f"""
declare {h} @llvm.x86.{of_bytes}({b}, {b})
declare {i} @llvm.x86.{of_pairs}({h}, {h})
define linkonce_odr {i} @moec_pairs_{n}({i} %codes, {i} %x) alwaysinline {{
  %c = bitcast {i} %codes to {b}
  %y = bitcast {i} %x to {b}
  %s = call {h} @llvm.x86.{of_bytes}({b} %c, {b} %y)
  %r = bitcast {h} %s to {i}
  ret {i} %r
}}
define linkonce_odr {i} @moec_plus16_{n}({i} %a, {i} %b) alwaysinline {{
  %x = bitcast {i} %a to {h}
  %y = bitcast {i} %b to {h}
  %s = add {h} %x, %y
  %r = bitcast {h} %s to {i}
  ret {i} %r
}}
define linkonce_odr {i} @moec_join_{n}({i} %acc, {i} %pairs) alwaysinline {{
  %p = bitcast {i} %pairs to {h}
  %s = call {i} @llvm.x86.{of_pairs}({h} %p, {h} {splat(2 * n, "i16", "1")})
  %r = add {i} %acc, %s
  ret {i} %r
}}
"""
