"""The report's lines on quantisation: bytes, errors of weights, errors of the model's outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from moec.errors import UnsupportedError
from moec.ir.formats.integer import dequantise, some_rows
from moec.ir.graph import Attr, Graph, Op, Program, Value
from moec.ir.ops.experts.quantised_linear import QUANTISED_OPS, StoredMatrix, matrices_of
from moec.passes.core.damage import RoundingStats
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Kind, Log, PassResult
from moec.passes.quantise.quantise_linears import LINEARS, heads
from moec.report.data import MovedLine, QuantisedLine
from moec.report.units import collapse_layer_indices

BROKEN = 0.5
"""An expert whose weights have a greater error, relative to their norm, counts as not quantised:
the error of an expert that was left out is 1, that of four bits a weight 0.1."""


def before_quantisation(pass_results: Sequence[PassResult]) -> tuple[PassResult, ...]:
    """The results of the passes before the first that rounds weights."""
    return tuple(
        takewhile(lambda pass_result: pass_result.kind is not Kind.QUANTISES, pass_results)
    )


def quantised_lines(pass_results: Sequence[PassResult]) -> tuple[QuantisedLine, ...]:
    """One line for each module with quantised weights: format, bytes before and after, errors.

    Raises UnsupportedError where quantisation ran and quantised nothing.
    """
    exact, last = before_quantisation(pass_results), pass_results[-1]
    if len(exact) == len(pass_results):
        return ()
    groups: dict[str, list[Op]] = {}
    for op in last.program.graph.ops:
        if op.name in QUANTISED_OPS:
            groups.setdefault(_line_key(op), []).append(op)
    if not groups:
        reasons = dict.fromkeys(d.reason for s in pass_results[len(exact) :] for d in s.declined)
        raise UnsupportedError(
            "quant: no weights were quantised: "
            + ("; ".join(reasons) or "no experts were recognised in the model")
        )
    before = exact[-1].program
    fits = {fit.weight: fit for pass_result in pass_results for fit in pass_result.fits}
    return tuple(
        _with_calibration(_line(ops, before, last.program), _fits_of(ops, fits))
        for ops in groups.values()
    )


def _fits_of(ops: Sequence[Op], fits: Mapping[str, RoundingStats]) -> list[RoundingStats]:
    stored = [each for op in ops for each in matrices_of(op)]
    names = dict.fromkeys(_ORIGINAL.sub("", each.matrix.codes.name) for each in stored)
    return [fits[name] for name in names if name in fits]


def _with_calibration(line: QuantisedLine, fits: Sequence[RoundingStats]) -> QuantisedLine:
    """The line with the statistics of calibration, over all its matrices."""
    if not fits:
        return line
    return replace(
        line,
        fewest=min(rows for fit in fits for rows in fit.rows_per_expert),
        few=tuple(sorted({e for fit in fits for e in fit.undersampled})),
        nearest=_rms(fit.nearest_error for fit in fits),
        solved=_rms(fit.gptq_error for fit in fits),
    )


def _rms(errors: Iterable[float]) -> float:
    values = list(errors)
    return math.sqrt(sum(e * e for e in values) / len(values))


def _line_key(op: Op) -> str:
    """The key of an op's line: the module path of experts, or the name of a linear layer's weight
    with * for its numbers."""
    name = _module_path(op)
    return name if op.name.startswith("grouped.") else re.sub(r"\d+", "*", name)


def with_exact_rows(program: Program, keep_row_bits: bool = True) -> Program:
    """The same quantised weights with rows that are not rounded. With `keep_row_bits`, the
    attribute `row_bits` stays, as a runtime may round rows itself; else it is dropped."""

    def rule(op: Op, b: Builder) -> Sequence[Value] | None:
        if op.name not in ("grouped.quantised", "grouped.mixed"):
            return None
        copied = {name: a for name, a in op.attrs.items() if keep_row_bits or name != "row_bits"}
        attrs: dict[str, Attr] = {**copied, "exact_rows": True}
        return b.emit(op.name, op.inputs, like=op, attrs=attrs, body=op.body)

    return replace(program, graph=rewrite(program.graph, rule, Log()))


def unquantised_lines(pass_results: Sequence[PassResult]) -> tuple[str, ...]:
    """A sentence for each layer of experts whose weights were not quantised."""
    if len(before_quantisation(pass_results)) == len(pass_results):
        return ()
    ops = pass_results[-1].program.graph.ops
    left = dict.fromkeys(_module_path(op) for op in ops if op.name == "grouped.linear")
    return tuple(f"the weights of {name} are not quantised" for name in left)


def moved_lines(
    names: Sequence[str],
    references: Iterable[Sequence[torch.Tensor]],
    changed: Iterable[Sequence[torch.Tensor]],
) -> tuple[MovedLine, ...]:
    """For each output, the error of `changed` relative to `references`, over all cases."""
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}
    for expected, actual in zip(references, changed, strict=True):
        for name, a, b in zip(names, expected, actual, strict=True):
            if a.is_floating_point() and a.numel() and a.ndim:
                pairs[name].append((a.float().flatten(0, -2), b.float().flatten(0, -2)))
    return tuple(_moved_line(name, tensors) for name, tensors in pairs.items() if tensors)


def _moved_line(name: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> MovedLine:
    off = size = 0.0
    moved = rows = 0
    for a, b in pairs:
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        finite = a.isfinite() & b.isfinite()
        off += float((a - b)[finite].double().pow(2).sum())
        size += float(a[finite].double().pow(2).sum())
        moved += int((a.argmax(-1) != b.argmax(-1)).sum())
        rows += len(a)
    return MovedLine(name, (off / size) ** 0.5 if size else 0.0, moved, rows)


def _module_path(op: Op) -> str:
    return op.origin or op.outputs[0].name


def _line(ops: Sequence[Op], before: Program, after: Program) -> QuantisedLine:
    matrices = {s.matrix.codes.name: s for op in ops for s in matrices_of(op)}  # each once
    wide = few = 0
    off: dict[int, float] = {}
    size: dict[int, float] = {}
    for number, stored in enumerate(matrices.values()):
        for part, weight, parts in stored_parts(stored, before, after):
            part = number if part is None else part
            wide += weight.numel() * weight.element_size()
            few += stored.format.nbytes(*weight.shape)
            for rows, *codes in some_rows(weight, *parts):
                a, b = rows.float(), dequantise(stored.format.kind, *codes)
                off[part] = off.get(part, 0.0) + float((a - b).double().pow(2).sum())
                size[part] = size.get(part, 0.0) + float(a.double().pow(2).sum())
    errors = [math.sqrt(off[part] / max(size[part], 1e-300)) for part in off]
    return QuantisedLine(
        collapse_layer_indices(tuple(dict.fromkeys(_module_path(op) for op in ops))),
        " and ".join(dict.fromkeys(str(stored.format) for stored in matrices.values())),
        parts=len(errors),
        covered=sum(error < BROKEN for error in errors),
        bytes_before=wide,
        bytes_after=few,
        error=math.sqrt(sum(off.values()) / max(sum(size.values()), 1e-300)),
        worst=max(errors),
    )


_ORIGINAL = re.compile(r"\.codes(_\d+)?$")
_PART = re.compile(r"\.\w+\.codes(_\d+)?$")


def stored_parts(
    stored: StoredMatrix, before: Program, after: Program
) -> Iterator[tuple[int | None, torch.Tensor, list[torch.Tensor]]]:
    """Each expert, or None for the one matrix: its number, its weights [N, K] before they were
    rounded, and its codes, scales and zeros."""
    name, experts = stored.matrix.codes.name, stored.experts
    original = before.weights[(_PART if experts else _ORIGINAL).sub("", name)]
    tensors = [after.weights[value.name] for value in stored.matrix.values]
    if original.ndim == 2:
        yield None, original, tensors
        return
    for e in range(len(tensors[0])):
        expert = experts[e] if experts else e
        yield expert, original[expert], [tensor[e] for tensor in tensors]


Formats = dict[str, dict[str, str]]


def code_bits(graph: Graph) -> dict[str, int]:
    """The bits in which each code of a quantised weight is stored, by the name of the codes."""
    quantised = [op for op in graph.ops if op.name in QUANTISED_OPS]
    return {s.matrix.codes.name: s.format.bits for op in quantised for s in matrices_of(op)}


def weight_formats(graph: Graph) -> Formats:
    """By kind, the format of each weight. Those that ops of two kinds read, such as tied
    embeddings, are of both."""
    kinds: Formats = {}
    params, last = set(graph.params), heads(graph)
    for op in graph.ops:
        names = {value.name: value.dtype for value in op.inputs if value in params}
        for stored in matrices_of(op) if op.name in QUANTISED_OPS else ():
            names |= {value.name: str(stored.format) for value in stored.matrix.values}
        kind = "other weights"
        if op.name.startswith("grouped."):
            kind = "experts"
        elif op.name in LINEARS:
            kind = "head" if op in last else "linears"
        if names:
            kinds.setdefault(kind, {}).update(names)
    return dict(sorted(kinds.items()))
