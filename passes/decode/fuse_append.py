"""The rotary embedding of keys is fused into the op that writes them to the cache.

    t = aten.permute(x) <dims=(0, 2, 1, 3)>
    r = nn.rotary(t, cos, sin)
    c = nn.append(cache, r, first)   ->   c = nn.append(cache, x, first, cos, sin)
                                              <turned, tokens_first>

This saves one kernel per layer and token, and a buffer of rotated keys. The products and sums are
the same: no bit changes. The pass runs on the decode program, the only one with caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.dtypes import VECTOR_DTYPES
from moec.errors import NoMatch
from moec.ir.graph import Op, Program, Stage, Value
from moec.ir.ops.dense.attention import Append
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass
from moec.passes.simplify.fold_permutes import other_reader, swaps


@dataclass(frozen=True)
class FuseAppend(Pass):
    """Rotate keys as they are written to the cache."""

    name: ClassVar[str] = "fuse-append"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fuse_append, log), program.weights)


def fuse_append(op: Op, b: Builder) -> Sequence[Value] | None:
    """The rule. Run after fold-permutes."""
    if op.name != "nn.append":
        return None
    append = Append.of(op)
    rotary = b.producers.get(append.rows)
    if rotary is None or rotary.name != "nn.rotary":
        return None
    x, cos, sin = rotary.inputs
    if append.tokens_first or append.cos is not None:
        raise NoMatch(f"{x.name} is rotated in the layout [B, tokens, heads, features]")
    if set(rotary.attrs.values()) - {"halves"}:
        raise NoMatch(
            f"the pairs of {x.name} are neighbouring features, and the cache kernel rotates halves"
        )
    for value in rotary.inputs:
        if value.dtype not in VECTOR_DTYPES:
            raise NoMatch(f"{value.name} is {value.dtype}, which the cache kernel cannot rotate")
    permute = b.producers.get(x)
    if permute is None or not swaps(permute):
        raise NoMatch(f"{x.name} is not a permutation of the layout")
    _require_alone(append.rows, op, b)
    _require_alone(x, rotary, b)
    fused = replace(append, rows=permute.inputs[0], cos=cos, sin=sin, tokens_first=True)
    return b.emit("nn.append", fused.inputs, like=op, attrs=fused.attrs())


def _require_alone(value: Value, reader: Op, b: Builder) -> None:
    other = other_reader(b.graph, value, lambda op: op.outputs == reader.outputs)
    if other:
        raise NoMatch(f"{value.name} is also read by {other}")
