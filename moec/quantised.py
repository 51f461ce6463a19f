"""What quantisation changed: bytes, weights, and the model's own outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

import torch

from moec.errors import UnsupportedError
from moec.ir import Op, Program
from moec.ops.quantised import GroupedQuantised, Matrix
from moec.passes.runner import Step
from moec.quantisation import Format, dequantise
from moec.report import MovedLine, QuantisedLine

BROKEN = 0.5
"""An expert whose weights are farther off, as a share of their norm, was not quantised: that of
an expert that was left out is 1, and four bits a weight give 0.1."""


def unquantised_steps(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps before the first that rounds weights."""
    return tuple(takewhile(lambda step: not step.quantises, steps))


def quantised_lines(steps: Sequence[Step]) -> tuple[QuantisedLine, ...]:
    """One line for each place with quantised weights: what it was, what it is, how far off.

    Raises UnsupportedError where quantisation ran and found nothing that it could do.
    """
    exact, last = unquantised_steps(steps), steps[-1]
    if len(exact) == len(steps):
        return ()
    places: dict[str, list[GroupedQuantised]] = {}
    for op in last.program.graph.ops:
        if op.name == "grouped.quantised":
            places.setdefault(_place(op), []).append(GroupedQuantised.of(op))
    if not places:
        reasons = dict.fromkeys(d.reason for s in steps[len(exact) :] for d in s.declined)
        raise UnsupportedError(
            "quant: no weights were quantised: "
            + ("; ".join(reasons) or "no experts were recognised in the model")
        )
    before = exact[-1].program
    return tuple(_line(place, ops, before, last.program) for place, ops in places.items())


def left_wide(steps: Sequence[Step]) -> tuple[str, ...]:
    """In words, the experts' weights that quantisation left as they were."""
    if len(unquantised_steps(steps)) == len(steps):
        return ()
    ops = steps[-1].program.graph.ops
    left = dict.fromkeys(_place(op) for op in ops if op.name == "grouped.linear")
    return tuple(f"the weights of {place} are not quantised" for place in left)


def moved_lines(
    names: Sequence[str],
    known: Iterable[Sequence[torch.Tensor]],
    changed: Iterable[Sequence[torch.Tensor]],
) -> tuple[MovedLine, ...]:
    """For each output, how far `changed` is from `known` over all cases."""
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}
    for wanted, got in zip(known, changed, strict=True):
        for name, a, b in zip(names, wanted, got, strict=True):
            if a.is_floating_point() and a.numel() and a.ndim:
                pairs[name].append((a.float().flatten(0, -2), b.float().flatten(0, -2)))
    return tuple(_moved(name, some) for name, some in pairs.items() if some)


def _moved(name: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> MovedLine:
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


def _place(op: Op) -> str:
    return op.origin or op.outputs[0].name


def _line(
    place: str, ops: Sequence[GroupedQuantised], before: Program, after: Program
) -> QuantisedLine:
    seen: dict[str, tuple[Matrix, Format]] = {
        matrix.codes.name: (matrix, parts.format) for parts in ops for matrix in parts.matrices
    }
    experts = len(after.weights[next(iter(seen))])
    off, size = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
    wide = few = 0
    for name, (matrix, format) in seen.items():
        original = before.weights[name.removesuffix(".codes")]
        wide += original.numel() * original.element_size()
        few += format.nbytes(original.shape[0] * original.shape[1], original.shape[2])
        for e, (a, b) in enumerate(_experts(original, matrix, format, after)):
            off[e] += (a - b).double().pow(2).sum()
            size[e] += a.double().pow(2).sum()
    errors = (off / size.clamp(min=1e-300)).sqrt()
    return QuantisedLine(
        place,
        str(next(iter(seen.values()))[1]),
        experts=experts,
        covered=int((errors < BROKEN).sum()),
        bytes_before=wide,
        bytes_after=few,
        error=float((off.sum() / size.sum().clamp(min=1e-300)).sqrt()),
        worst_expert=float(errors.max()),
    )


def _experts(
    original: torch.Tensor, matrix: Matrix, format: Format, after: Program
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each expert's weights before and after, in float32."""
    stored = [after.weights[value.name] for value in matrix.values]
    for e, weight in enumerate(original):
        yield weight.float(), dequantise(format.kind, *(t[e] for t in stored))
