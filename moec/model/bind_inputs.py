"""Binds inputs of a captured model to constants, for `specialise`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from moec.capture import Captured
from moec.ir.sizes.dims import bind_shape, evaluate_dim
from moec.passes.core.options import Given
from moec.passes.core.runner import Pass
from moec.passes.specialise.bind_inputs import bind, seeds


def bound(captured: Captured, passes: Iterable[Pass]) -> Captured:
    """`captured` without the inputs that passes bind: its program, example and eager function.

    Raises UsageError as `moec.passes.specialise.bind_inputs.bind` does.
    """
    for pass_ in passes:
        if pass_.binds:
            captured = _bound(captured, pass_.binds, pass_.name)
    return captured


def _bound(captured: Captured, bindings: Given, where: str) -> Captured:
    inputs = captured.program.graph.inputs
    program = bind(captured.program, bindings, where)
    left = program.graph.inputs
    constants = {value.name: tensor for value, tensor in seeds(program).items()}
    arguments = [value for value in inputs if value not in {s.before for s in program.graph.states}]

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes: dict[str, int] = {}
        for value, tensor in zip(left, tensors, strict=False):
            bind_shape(value.shape, tuple(tensor.shape), sizes)
        filled = iter(tensors)
        return captured.eager(
            *(
                next(filled)
                if value in left
                else constants[value.name].expand([evaluate_dim(d, sizes) for d in value.shape])
                for value in arguments
            )
        )

    pairs = zip(arguments, captured.example, strict=False)
    example = tuple(tensor for value, tensor in pairs if value in left)
    # Sizes beyond those of the program are those of all inputs.
    return replace(captured, program=program, eager=eager, example=example, beyond=())
