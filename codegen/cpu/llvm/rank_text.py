"""LLVM functions of routing: integer ranks of floats, and the first of the greatest."""

from __future__ import annotations

from moec.codegen.cpu.llvm.constants import splat


def rank_functions(n: int) -> str:
    f, i = f"<{n} x float>", f"<{n} x i32>"

    def const(value: int) -> str:
        return splat(n, "i32", value)

    # Adding 0.0 turns -0.0 into 0.0. Negative floats order backwards as integers: flip them.
    return f"""
declare i32 @llvm.vector.reduce.smax.v{n}i32({i})
declare i32 @llvm.vector.reduce.smin.v{n}i32({i})
define linkonce_odr {i} @moec_ranks_{n}({f} %a) alwaysinline {{
  %x = fadd {f} %a, zeroinitializer
  %b = bitcast {f} %x to {i}
  %s = ashr {i} %b, {const(31)}
  %m = and {i} %s, {const(2**31 - 1)}
  %k = xor {i} %b, %m
  %nan = fcmp uno {f} %a, %a
  %r = select <{n} x i1> %nan, {i} {const(2**31 - 1)}, {i} %k
  ret {i} %r
}}
define linkonce_odr i32 @moec_first_{n}({i} %ranks, {i} %ids) alwaysinline {{
  %top = call i32 @llvm.vector.reduce.smax.v{n}i32({i} %ranks)
  %t0 = insertelement {i} poison, i32 %top, i32 0
  %tops = shufflevector {i} %t0, {i} poison, {i} zeroinitializer
  %equal = icmp eq {i} %ranks, %tops
  %among = select <{n} x i1> %equal, {i} %ids, {i} {const(2**31 - 1)}
  %r = call i32 @llvm.vector.reduce.smin.v{n}i32({i} %among)
  ret i32 %r
}}
"""
