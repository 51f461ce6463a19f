"""grouped.mixed: grouped.quantised whose experts have several formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.errors import UsageError
from moec.ir.formats.integer import dequantise, round_rows
from moec.ir.formats.notation import Format, parse
from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Runner, defop, inputs_of, integer, require, tensors_of
from moec.ir.ops.experts.grouped import INPUTS, Grouped, in_float32, rows_of
from moec.ir.ops.experts.quantised import Matrix, check_matrix, check_stacks


@dataclass(frozen=True)
class MixedPart:
    """The experts of one format, by number; matrix j of the i-th of them is matrices[j][i]."""

    format: Format
    experts: tuple[int, ...]
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class GroupedMixed(Grouped[Matrix]):
    """The inputs of grouped.mixed by name; `matrices` are those of all parts."""

    parts: tuple[MixedPart, ...]

    @staticmethod
    def of(op: Op) -> GroupedMixed:
        inputs, count = inputs_of(op), integer(op, "matrices")
        formats, numbers = _formats(op), op.attrs.get("experts")
        every = set(range(len(formats)))
        fits = isinstance(numbers, tuple) and set(numbers) == every
        require(op, fits, f"experts have formats {numbers}, not each of {len(formats)}")
        left, parts = list(inputs["matrices"]), []
        for number, format in enumerate(formats):
            each = 2 + format.asymmetric
            require(op, len(left) >= count * each, "lacks parts of its matrices")
            stored = tuple(Matrix(*left[each * i : each * (i + 1)]) for i in range(count))
            del left[: count * each]
            experts = (e for e, n in enumerate(cast(tuple[int, ...], numbers)) if n == number)
            parts.append(MixedPart(format, tuple(experts), stored))
        require(op, not left, "has inputs that no attribute names")
        matrices = tuple(m for part in parts for m in part.matrices)
        return GroupedMixed(**{**inputs, "matrices": matrices}, parts=tuple(parts))


def _formats(op: Op) -> tuple[Format, ...]:
    texts = op.attrs.get("formats")
    require(op, isinstance(texts, tuple) and bool(texts), "lacks the formats of its experts")
    try:
        formats = tuple(parse(cast(str, text)) for text in cast(tuple[object, ...], texts))
    except UsageError as error:
        require(op, False, str(error))
    require(op, len(set(formats)) == len(formats), f"formats {texts} are repeated")
    rows = {format.row_bits for format in formats}
    require(op, rows == {op.attrs.get("row_bits", 8)}, f"its formats round rows to {rows} bits")
    return formats


def _infer(op: Op) -> tuple[TensorType, ...]:
    parts = GroupedMixed.of(op)
    for part in parts.parts:
        for matrix in part.matrices:
            stored = check_matrix(op, matrix, part.format.kind, part.format.row_bits)
            width = int(str(matrix.codes.shape[-1]))
            same = stored.blocks(width) == part.format.blocks(width)
            require(op, same, f"{matrix.scales} of {part.format}")
        check_stacks(op, parts.x, (len(part.experts),), part.matrices)
    first = parts.matrices[0].codes
    total = sum(len(part.experts) for part in parts.parts)
    require(op, parts.ends.shape == (total,), f"{total} experts for {parts.ends}")
    same = {matrix.codes.shape[1:] for matrix in parts.matrices} == {first.shape[1:]}
    require(op, same, "its stacks differ in shape")
    for bias in parts.biases:
        require(op, bias.shape == (total, first.shape[1]), f"{bias} for {total} experts")
    return rows_of(op, parts, first.shape[1])


@defop("grouped.mixed", _infer, INPUTS, tokenwise=True)
def grouped_mixed(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x, ends[E], (codes[E_f, N, K], scales[E_f, N, b], zeros[E_f, N, b]?)… of each format f,
    biases[E, N]…, order[R]?, scale[T, k]? -> h[R, N].

    As grouped.quantised, where expert e has the format `formats[experts[e]]`, spelled as for
    --quant, and its row is rounded in the blocks of that format. A stack of a format holds its
    experts by ascending number. All formats round rows to `row_bits`.
    """
    inputs = tensors_of("grouped.mixed", op, tensors, attrs)
    names = dict(zip(op.inputs, tensors, strict=True))
    parts = GroupedMixed.of(op).parts
    owners = {e: (part, i) for part in parts for i, e in enumerate(part.experts)}
    exact, width = bool(attrs.get("exact_rows")), inputs["x"].shape[-1]

    def rounded(format: Format) -> torch.Tensor:
        x = inputs["x"]
        return x.float() if exact else round_rows(x, format.blocks(width), format.row_bits)

    rows = {part.format: rounded(part.format) for part in parts}

    def matrices(expert: int) -> list[torch.Tensor]:
        part, i = owners[expert]
        stored = ([names[value][i] for value in m.values] for m in part.matrices)
        return [dequantise(part.format.kind, *tensors) for tensors in stored]

    def rows_for(expert: int) -> torch.Tensor:
        return rows[owners[expert][0].format]

    n = int(str(op.outputs[0].shape[1]))
    return in_float32(op, rows_for, inputs, attrs, run, matrices, n)
