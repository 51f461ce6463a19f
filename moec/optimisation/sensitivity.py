"""What each format of each product's weights costs in bytes and in quality, measured on data.

The relative error of a product's results, on sampled rows of each expert, is measured for every
format. How much the model suffers from an error
there is measured with that product alone in its coarsest format and in one of half the logarithm of
the errors: the divergence of the model's next token (or, for other models, the squared relative
error of its outputs). Divergence saturates, so that the damage of a format is a power of its error
between the two, and proportional to the squared error below them; that of a format of one expert
is the part that the expert has in this error, by `row_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from moec.errors import NoMatch, UsageError
from moec.formats.integer import dequantise, quantise, round_rows
from moec.formats.notation import Format
from moec.ir.graph import Op, Program
from moec.optimisation.pinned import PinnedFormat, check_pinned, pinned_for
from moec.optimisation.row_gradients import Gradients, row_gradients
from moec.passes.approximate.choices.model_choices import UNCHANGED, ProductChoice, significant
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.core.damage import Distance
from moec.passes.core.moe_layer import Layer
from moec.passes.core.runner import Log
from moec.passes.quantise.codes import Codes
from moec.passes.quantise.fixed_formats import FixedFormats, named_products, shape_of
from moec.passes.quantise.gptq_codes import rows_of, stored
from moec.passes.quantise.mixed_experts import mixable

SAMPLED = 64
"""Rows of each expert on which errors are measured."""


@dataclass(frozen=True)
class StoredProduct:
    """A product that can be quantised: its name (`named_products`), what can be chosen, first its
    weights as they are unless a format is pinned, the layer that has it as its experts, if their
    number can change, and what can be chosen for each of its `experts` instead, if anything."""

    name: str
    options: tuple[ProductChoice, ...]
    layer: str = ""
    experts: tuple[tuple[ProductChoice, ...], ...] = ()


def damage_of(distance: Distance) -> float:
    return distance.error**2 if distance.kl is None else distance.kl


def measure_products(
    program: Program,
    evaluator: Evaluator,
    formats: Sequence[Format],
    layers: Mapping[str, Layer],
    log: Log,
    *,
    by_expert: bool = False,
    pinned: Sequence[PinnedFormat] = (),
) -> tuple[StoredProduct, ...]:
    """Every product with the bytes and the predicted damage of each format that fits it, and with
    `by_expert` those of each expert's formats. Raises UsageError for a `pinned` format that does
    not fit, and a pattern that no product matches."""
    named = named_products(program.graph)
    check_pinned(named, pinned)
    pins = {name: pinned_for(name, pinned) for name in named}
    choosable = {
        name: formats if pin is None else () if pin.format is None else (pin.format,)
        for name, pin in pins.items()
    }
    ops = [op for name, op in named.items() if choosable[name]]
    rows_of_each = rows_of(program, evaluator.calibration, ops)
    products = {
        op.outputs[0].name: stored(op)[0].shape[0]
        for op in ops
        if by_expert and op.name == "grouped.linear"
    }
    gradients = row_gradients(program, evaluator, products, SAMPLED) if products else {}
    measured = []
    for name, op in named.items():
        pin, considered = pins[name], choosable[name]
        rows = next(rows_of_each) if considered else []
        fitting = [f for f in considered if _fits(program, op, f, log)]
        if pin is not None and len(fitting) < len(considered):
            raise UsageError(f"{name} cannot be {pin.format}: {log.declined[-1].reason}")
        of_rows = gradients.get(op.outputs[0].name)
        of_experts = {f: _relative_errors(program, op, f, rows, of_rows) for f in fitting}
        errors = {f: float(each.sum()) for f, each in of_experts.items()}
        shape = shape_of(op)
        size = sum(program.weights[matrix.name].nbytes for matrix in stored(op))
        options = [ProductChoice(*shape, UNCHANGED, size, size, 0.0)]
        experts: tuple[tuple[ProductChoice, ...], ...] = ()
        if errors:

            def damage_alone(format: Format, name: str = name) -> float:
                alone = FixedFormats({name: format}).run(program, Log(memory=log.memory))
                return damage_of(evaluator.measure(alone)[0])

            scales = damage_of_errors(errors, damage_alone)
            for f, error in errors.items():
                damage = significant(scales[f] * error)
                options.append(ProductChoice(*shape, str(f), _bytes(op, f), size, damage))
            if of_rows is not None:
                experts = _of_experts(options[1:], mixable(fitting), of_experts, scales)
        if pin is not None:
            options = options[-1:]
        measured.append(StoredProduct(name, tuple(options), _layer_with(op, layers), experts))
    return tuple(measured)


def damage_of_errors(
    errors: Mapping[Format, float], damage_alone: Callable[[Format], float]
) -> dict[Format, float]:
    """The damage of a squared error of 1 in each format, from what two of the formats do alone."""
    coarse = max(errors, key=lambda f: errors[f])
    if not errors[coarse]:
        return dict.fromkeys(errors, 0.0)
    inexact = [f for f in errors if errors[f]]
    half = math.sqrt(errors[coarse] * min(errors[f] for f in inexact))
    fine = min(inexact, key=lambda f: abs(math.log(errors[f] / half)))
    most = damage_alone(coarse) / errors[coarse]
    least = damage_alone(fine) / errors[fine] if fine != coarse else most
    if not (most and least):
        return dict.fromkeys(errors, most)
    slope = max(-1.0, math.log(most / least) / (math.log(errors[coarse] / errors[fine]) or 1.0))
    return {f: least * (max(e, errors[fine]) / errors[fine]) ** slope for f, e in errors.items()}


def _of_experts(
    options: Sequence[ProductChoice],
    formats: Sequence[Format],
    errors: Mapping[Format, Tensor],
    scales: Mapping[Format, float],
) -> tuple[tuple[ProductChoice, ...], ...]:
    """The options of each expert, those of the product in `formats`; none if that is one."""
    by_format = {option.format: option for option in options}
    if len(formats) < 2:
        return ()
    count = len(errors[formats[0]])
    return tuple(
        tuple(
            msgspec.structs.replace(
                option := by_format[str(f)],
                bytes=option.bytes // count,
                bytes_before=option.bytes_before // count,
                damage=significant(scales[f] * float(errors[f][e])),
            )
            for f in formats
        )
        for e in range(count)
    )


def _layer_with(op: Op, layers: Mapping[str, Layer]) -> str:
    """The layer of experts that a product belongs to; empty for any other product."""
    for name, layer in layers.items():
        origins = {layer.experts.origin, *(c.experts.origin for c in layer.companions)}
        if op.name == "grouped.linear" and op.origin in origins:
            return name if stored(op)[0].shape[0] == layer.count else ""
    return ""


def _fits(program: Program, op: Op, format: Format, log: Log) -> bool:
    codes = Codes(program, log.memory)
    try:
        for matrix in stored(op):
            codes.check(matrix, format)
    except NoMatch as why:
        log.decline(op.origin or op.outputs[0].name, f"{format}: {why}")
        return False
    return True


def _relative_errors(
    program: Program,
    op: Op,
    format: Format,
    rows: Sequence[Tensor],
    gradients: Gradients | None,
) -> Tensor:
    """The squared error of each expert's results, f64[E], relative to the squared norm of those of
    all experts, with rounded weights and rows; with `gradients`, of both times the gradients."""
    off, norm = torch.zeros(len(rows), dtype=torch.float64), 0.0
    for number, matrix in enumerate(stored(op)):
        weight = program.weights[matrix.name].detach()
        stacked = weight if weight.ndim == 3 else weight[None]
        for expert, x in enumerate(rows):
            sample = gradients[number][expert].sampled() if gradients else _evenly(x)
            if sample is None:
                continue
            (few, times, factors), part = sample, stacked[expert : expert + 1]
            codes = quantise(format, part)
            wide = part[0].float()
            rounded = dequantise(format.kind, codes.codes, codes.scales, codes.zeros)[0]
            rows_in_use = round_rows(few, codes.scales.shape[-1], format.row_bits)
            right = few @ wide.mT
            wrong = rows_in_use @ rounded.mT - right
            off[expert] += float((wrong * factors).square().sum(-1) @ times)
            norm += float((right * factors).square().sum(-1) @ times)
    return off / norm if norm else off


def _evenly(x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Some of the rows, in float32, how many each counts for, and a factor of 1."""
    if not len(x):
        return None
    rows = x[:: -(-len(x) // SAMPLED)].float()
    return rows, torch.full((len(rows),), len(x) / len(rows)), torch.ones(1)


def _bytes(op: Op, format: Format) -> int:
    shapes = [[int(str(size)) for size in matrix.shape] for matrix in stored(op)]
    return sum(format.nbytes(math.prod(shape[:-1]), shape[-1]) for shape in shapes)
