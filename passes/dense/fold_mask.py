"""A mask that depends on sizes only becomes attributes of nn.attention, or is removed.

    y = nn.attention(q, k, v, mask) <masked>   ->   y = nn.attention(q, k, v) <causal, window=W>

The mask's elements are compared with each closed form: no mask; causal; causal within a window of W
keys; causal within chunks of C keys (Llama 4); chunks only. A bool mask that is a conjunction is
split, and its parts that read data (padding) stay a mask. mask_forms explains why comparing some
sizes proves it for all.

Masks that are added may hold 0 where a key is visible, and -inf or the dtype's least number
where it is hidden: exp(score + mask - max) is 0 either way if the row has one visible key, which
a causal row has (key 0, or with as many keys as queries its own).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, Stage, TensorType, Value
from moec.ops.dense.attention import Attention
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass
from moec.passes.dense.mask_forms import MaskForm, closed_form
from moec.passes.dense.mask_values import FILLED, cut

_AND = ("aten.bitwise_and.Tensor", "aten.logical_and.default")


@dataclass(frozen=True)
class FoldMask(Pass):
    """Replace masks that depend on sizes only by attributes: causal, window, chunk."""

    name: ClassVar[str] = "fold-mask"
    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        folder = _MaskFolder(program.graph, program.weights)
        return Program(rewrite(program.graph, folder.rule, log), program.weights)


@dataclass
class _MaskFolder:
    """The rewrite rule, and the forms of the masks so far, as layers share masks."""

    graph: Graph
    weights: Mapping[str, torch.Tensor]
    forms: dict[tuple[Value, ...], MaskForm | NoMatch] = field(default_factory=dict)
    reading: set[Value] = field(default_factory=set)
    followed: int = 0

    def rule(self, op: Op, b: Builder) -> Sequence[Value] | None:
        if op.name != "nn.attention" or not op.attrs.get("masked"):
            return None
        attention = Attention.of(op)
        mask = attention.mask
        assert mask is not None
        sized, read = self.parts(mask, b)
        form = self.form(tuple(sized), attention, b)
        if attention.window is not None or attention.chunk is not None:
            raise NoMatch("the attention has a window or chunks besides its mask")
        left = _conjunction(read, op, b)
        causal = attention.causal or form.causal
        folded = replace(attention, mask=left, causal=causal, window=form.window, chunk=form.chunk)
        return b.emit("nn.attention", folded.inputs, like=op, attrs=folded.attrs())

    def parts(self, mask: Value, b: Builder) -> tuple[list[Value], list[Value]]:
        """The parts that depend on sizes only, and those that read data."""
        self.follow(b)
        parts = list(_conjuncts(mask, b)) if mask.dtype == "bool" else [mask]
        sized = [part for part in parts if part not in self.reading]
        return (sized, [p for p in parts if p in self.reading]) if sized else (parts, [])

    def follow(self, b: Builder) -> None:
        """Update `reading`, the values that depend on inputs' data, up to the last op."""
        self.reading |= set(self.graph.inputs)
        for op in b.ops[self.followed :]:
            if op.name not in FILLED and not self.reading.isdisjoint(op.inputs):
                self.reading |= set(op.outputs)
        self.followed = len(b.ops)

    def form(self, parts: tuple[Value, ...], attention: Attention, b: Builder) -> MaskForm:
        if parts not in self.forms:
            try:
                source = cut(parts, self.graph, self.weights, b.producers)
                self.forms[parts] = closed_form(parts, source, attention, self.graph.bounds)
            except NoMatch as why:
                self.forms[parts] = why
        form = self.forms[parts]
        if isinstance(form, NoMatch):
            raise NoMatch(str(form))
        return form


def _conjuncts(mask: Value, b: Builder) -> Iterator[Value]:
    op = b.producers.get(mask)
    if op is not None and op.name in _AND and all(v.dtype == "bool" for v in op.inputs):
        for part in op.inputs:
            yield from _conjuncts(part, b)
    elif op is not None and op.name == "aten.expand.default":
        yield from _conjuncts(op.inputs[0], b)
    else:
        yield mask


def _conjunction(parts: Sequence[Value], op: Op, b: Builder) -> Value | None:
    """The `and` of masks, with four axes."""
    total: Value | None = None
    for part in parts:
        part = b.reshape(part, (*(1,) * (4 - len(part.shape)), *part.shape), like=op)
        if total is not None:
            pairs = zip(total.shape, part.shape, strict=True)
            target = TensorType("bool", tuple(y if x == 1 else x for x, y in pairs))
            (part,) = b.emit("aten.bitwise_and.Tensor", [total, part], [target], like=op)
        total = part
    return total
