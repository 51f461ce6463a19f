"""Permutations before and after attention become attributes of it: the layout of its operands.

    t = aten.permute(x) <dims=(0, 2, 1, 3)>      x[B, S, H, D], as a linear layer gives it
    y = nn.attention(q, k, t)                ->  y = nn.attention(q, k, x) <tokens_first=("v")>

    y = nn.attention(q, k, v)                ->  z = nn.attention(q, k, v) <tokens_first=("out")>
    z = aten.permute(y) <dims=(0, 2, 1, 3)>

Each saves a kernel that only copies queries, keys, values or results. The features of a token are
contiguous in both layouts, so attention's kernels read and write both at the same speed, and no bit
changes. A permutation with other readers stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, Stage, Value
from moec.ir.ops.dense.attention import SWAP, Attention
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FoldPermutes(Pass):
    """Let attention read and write the layout of linear layers, without permuting."""

    name: ClassVar[str] = "fold-permutes"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, partial(fold_permutes, log), log), program.weights)


def fold_permutes(log: Log, op: Op, b: Builder) -> Sequence[Value] | None:
    """The rewrite rule. It declines each operand with other readers, and folds the rest."""
    if op.name == "nn.attention":
        return _fold_operands(log, op, b)
    return _fold_output(op, b) if swaps(op) else None


def swaps(op: Op) -> bool:
    """Whether an op swaps tokens and heads."""
    return op.name == "aten.permute.default" and op.attrs.get("dims") == SWAP


def _fold_operands(log: Log, op: Op, b: Builder) -> Sequence[Value] | None:
    attention, unpermuted = Attention.of(op), dict[str, Value]()
    for name in "qkv":
        value: Value = getattr(attention, name)
        source = b.producers.get(value)
        if source is None or not swaps(source):
            continue
        other = other_reader(b.graph, value, lambda reader: reader.name == "nn.attention")
        if other:
            log.decline(op.origin or op.outputs[0].name, f"{value.name} is also read by {other}")
            continue
        unpermuted[name] = source.inputs[0]
    if not unpermuted:
        return None
    folded = attention.with_tokens_first({*attention.tokens_first} ^ {*unpermuted})
    folded = replace(folded, **unpermuted)  # type: ignore[arg-type]
    return b.emit("nn.attention", folded.inputs, like=op, attrs=folded.attrs())


def _fold_output(op: Op, b: Builder) -> Sequence[Value] | None:
    source = b.producers.get(op.inputs[0])
    if source is None or source.name != "nn.attention":
        return None
    old = b.graph.producers[op.outputs[0]]
    other = other_reader(b.graph, old.inputs[0], lambda reader: reader is old)
    if other:
        raise NoMatch(f"{old.inputs[0].name} is also read by {other}")
    attention = Attention.of(source)
    folded = attention.with_tokens_first({*attention.tokens_first} ^ {"out"})
    return b.emit("nn.attention", folded.inputs, like=source, attrs=folded.attrs())


def other_reader(graph: Graph, value: Value, expected: Callable[[Op], bool]) -> str | None:
    """The first reader of a value that is not `expected`, in words; None if there is none."""
    for reader in graph.readers.get(value, ()):
        if not expected(reader):
            return f"{reader.name} at {reader.origin}" if reader.origin else reader.name
    return "the caller" if value in graph.results else None
