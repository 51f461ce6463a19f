"""New keys or values into a cache, in place: cache[b, h, first[b] + s] = rows[b, h, s].

cache[B, H, L, D]  rows[B, H, S, D] or [B, S, H, D]  first[B]
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cpu import tasks
from moec.codegen.cpu.dtypes import TVM_DTYPES
from moec.codegen.cpu.tasks import ELEMENT, divide
from moec.target import Target

_WORDS = {"f32": ("int32", 1), "bf16": ("int16", 2), "f16": ("int16", 2)}
"""As what elements are moved, and how many of them take the room of a float32."""


@dataclass(frozen=True)
class AppendSpec:
    """`tokens_first` rows are [B, S, H, D]; the cache never is."""

    dtype: str
    heads: int
    width: int
    tokens_first: bool = False

    def row(self, b: Expr, h: Expr | int, s: Expr) -> tuple[Expr | int, ...]:
        """The index of a row; of sizes, the shape of all."""
        return (b, s, h) if self.tokens_first else (b, h, s)


def append(spec: AppendSpec, target: Target, name: str = "append") -> PrimFunc:
    """The kernel (cache, rows, first), all contiguous; first[b] + S is at most L."""
    with IRBuilder() as ib:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            batch, room, tokens = T.int64(), T.int64(), T.int64()
            dtype, (word, many) = TVM_DTYPES[spec.dtype], _WORDS[spec.dtype]
            kept = (batch, spec.heads, room, spec.width)
            new = (*spec.row(batch, spec.heads, tokens), spec.width)
            given = T.match_buffer(T.arg("cache", T.handle()), kept, dtype)
            fresh = T.match_buffer(T.arg("rows", T.handle()), new, dtype)
            first = T.match_buffer(T.arg("first", T.handle()), (batch,), "int64")
            cache = T.decl_buffer(kept, word, data=given.data)
            rows = T.decl_buffer(new, word, data=fresh.data)
            lanes = target.vector_lanes * many
            whole, rest = divmod(spec.width, lanes)
            count = batch * spec.heads * tokens
            work = count * (spec.width * ELEMENT)
            with tasks.functions(), tasks.shared(count, work) as task:
                head, s = divide(task, tokens)
                b = T.bind(T.floordiv(head, spec.heads))
                h = T.bind(T.floormod(head, spec.heads))
                to = T.bind(first[b] + s)
                row = spec.row(b, h, s)
                for j in range(whole):
                    place = T.ramp(j * lanes, 1, lanes)
                    T.buffer_store(cache, rows[(*row, place)], [b, h, to, place])
                for j in range(whole * lanes, whole * lanes + rest):
                    T.buffer_store(cache, rows[(*row, j)], [b, h, to, j])
    return ib.get()
