"""What each format of each product's weights costs in bytes and in quality, predicted on data.

The error of a product's results is measured on sampled rows of each expert for every format, with
weights and rows rounded as kernels round them, and multiplied with the gradients of these rows
(`row_gradients`): the divergence of the model's next token, or, for other models, the squared
relative error of its outputs. One run over the data and back gives those of all products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from moec.errors import NoMatch, UsageError
from moec.ir.formats.integer import dequantise, quantise, round_rows
from moec.ir.formats.notation import Format
from moec.ir.graph import Op, Program
from moec.optimise.optimisation.pinned import PinnedFormat, check_pinned, pinned_for
from moec.optimise.optimisation.row_gradients import Gradients, row_gradients
from moec.passes.approximate.choices.drop_shared import SharedExpert
from moec.passes.approximate.choices.model_choices import UNCHANGED, ProductChoice, significant
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.core.damage import Distance
from moec.passes.core.moe_layer import Layer
from moec.passes.core.runner import Log
from moec.passes.quantise.codes import Codes
from moec.passes.quantise.fixed_formats import named_products, shape_of
from moec.passes.quantise.gptq_codes import stored
from moec.passes.quantise.mixed_experts import mixable

SAMPLED = 64
"""Rows of each expert on which errors are measured."""


@dataclass(frozen=True)
class StoredProduct:
    """A product that can be quantised: its name (`named_products`), what can be chosen, first its
    weights as they are unless a format is pinned, the layer that has it as its experts, if their
    number can change, or the shared expert that can be dropped with it, and what can be chosen for
    each of its `experts` instead, if anything."""

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
    shared: Mapping[str, SharedExpert],
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
    products = {op.outputs[0].name: _experts_of(op) for op in ops}
    gradients = row_gradients(program, evaluator, products, SAMPLED)
    measured = []
    for name, op in named.items():
        pin, considered = pins[name], choosable[name]
        fitting = [f for f in considered if _fits(program, op, f, log)]
        if pin is not None and len(fitting) < len(considered):
            raise UsageError(f"{name} cannot be {pin.format}: {log.declined[-1].reason}")
        damages = _damages(program, op, fitting, gradients)
        shape = shape_of(op)
        size = sum(program.weights[matrix.name].nbytes for matrix in stored(op))
        options = [ProductChoice(*shape, UNCHANGED, size, size, 0.0)]
        for f, each in damages.items():
            damage = significant(float(each.sum()))
            options.append(ProductChoice(*shape, str(f), _bytes(op, f), size, damage))
        experts: tuple[tuple[ProductChoice, ...], ...] = ()
        if damages and by_expert and op.name == "grouped.linear":
            experts = _of_experts(options[1:], mixable(fitting), damages)
        if pin is not None:
            options = options[-1:]
        owner = _layer_with(op, layers) or _shared_with(op, shared)
        measured.append(StoredProduct(name, tuple(options), owner, experts))
    return tuple(measured)


def _experts_of(op: Op) -> int:
    return int(str(stored(op)[0].shape[0])) if op.name == "grouped.linear" else 1


def _of_experts(
    options: Sequence[ProductChoice],
    formats: Sequence[Format],
    damages: Mapping[Format, Tensor],
) -> tuple[tuple[ProductChoice, ...], ...]:
    """The options of each expert, those of the product in `formats`; none if that is one."""
    by_format = {option.format: option for option in options}
    if len(formats) < 2:
        return ()
    count = len(damages[formats[0]])
    return tuple(
        tuple(
            msgspec.structs.replace(
                option := by_format[str(f)],
                bytes=option.bytes // count,
                bytes_before=option.bytes_before // count,
                damage=significant(float(damages[f][e])),
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


def _shared_with(op: Op, shared: Mapping[str, SharedExpert]) -> str:
    """The shared expert that a linear layer belongs to; empty for any other product."""
    return next((name for name, each in shared.items() if op.origin in each.origins), "")


def _fits(program: Program, op: Op, format: Format, log: Log) -> bool:
    codes = Codes(program, log.memory)
    try:
        for matrix in stored(op):
            codes.check(matrix, format)
    except NoMatch as why:
        log.decline(op.origin or op.outputs[0].name, f"{format}: {why}")
        return False
    return True


def _damages(
    program: Program, op: Op, formats: Sequence[Format], gradients: Gradients
) -> dict[Format, Tensor]:
    """Of each format the damage of each expert's errors, f64[E], with rounded weights and rows."""
    damages = {format: torch.zeros(_experts_of(op), dtype=torch.float64) for format in formats}
    of_matrices = gradients.rows.get(op.outputs[0].name, ())
    for matrix, of_experts in zip(stored(op), of_matrices, strict=bool(of_matrices)):
        weight = program.weights[matrix.name].detach()
        stacked = weight if weight.ndim == 3 else weight[None]
        for expert, sample in enumerate(each.sampled() for each in of_experts):
            if sample is None:
                continue
            (x, times, factors), part = sample, stacked[expert : expert + 1].float()
            exact = x @ part[0].mT
            for format, of_format in damages.items():
                codes = quantise(format, part)
                rounded = dequantise(format.kind, codes.codes, codes.scales, codes.zeros)[0]
                rows = round_rows(x, codes.scales.shape[-1], format.row_bits)
                wrong = (rows @ rounded.mT).sub_(exact).mul_(factors)
                of_format[expert] += float(wrong.square_().sum(-1) @ times)
    return {format: of_format * gradients.scale for format, of_format in damages.items()}


def _bytes(op: Op, format: Format) -> int:
    shapes = [[int(str(size)) for size in matrix.shape] for matrix in stored(op)]
    return sum(format.nbytes(math.prod(shape[:-1]), shape[-1]) for shape in shapes)
