"""What it means that a program computes what its module computes.

All results of all cases must be equal, up to the rounding of reordered sums. A program that rounds
to 16 bits and differs by more is compared in float32, the program and the module both: there,
nearly equal router scores are no excuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from moec.errors import IRError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate_anywhere
from moec.ir.interpret.outputs import VaryingOutput
from moec.ir.interpret.resized import with_sizes
from moec.ir.interpret.run_in_float32 import MEANING, eager_in_float32, in_float32
from moec.ir.sizes.dims import bind_shape, evaluate_dim, symbols
from moec.oracle.cases import Eager, Inputs, cases
from moec.oracle.draws import Draw, Role, role_of
from moec.oracle.tolerance import default_tolerance, distance, rounds_to_16_bits

_FAILURES = (RuntimeError, IRError, IndexError, ValueError, ArithmeticError)
"""What a graph raises where it cannot be evaluated, such as 100 % n at a size of 0."""


PARTS, POSITIONS = 8, 64
"""How many parts of an example are compared where it is cut to few elements, of those that begin at
so many positions."""


def agree(
    program: Program, eager: Eager, example: Inputs, draws: Sequence[Draw] | None = None
) -> bool | None:
    """Whether program and module agree on the example and on draws of its sizes (`few_draws`); None
    where the module refuses all of them. A module that returns other constants disagrees."""
    runs = False
    try:
        for case, expected in cases(program, example, eager, draws):
            runs = True
            if not same_results(program, eager, case, expected):
                return False
    except VaryingOutput:
        return False
    return True if runs else None


def agree_at_sizes(
    program: Program, eager: Eager, example: Inputs, sizes: Mapping[str, int]
) -> bool | None:
    """As `agree`, on the example repeated and cut to `sizes`. Where integers are cut to few, other
    parts of the example are compared too: the first has one task, one segment, one length."""
    answer = agree(program, eager, at_sizes(program, example, sizes))
    if not answer:
        return answer
    parts = _other_parts(program, example, sizes)
    return all(agree(program, eager, part, ()) is not False for part in parts)


def _other_parts(
    program: Program, example: Inputs, sizes: Mapping[str, int]
) -> Iterator[list[torch.Tensor]]:
    """The example at `sizes` from other positions on, if its few integers are others there."""
    met = {_few_integers(program, at_sizes(program, example, sizes))}
    if met == {()}:
        return
    for number in range(1, POSITIONS):
        rolled = []
        for value, tensor in zip(program.graph.inputs, example, strict=False):
            axes = [axis for axis, dim in enumerate(value.shape) if symbols(dim) & sizes.keys()]
            left = number
            for axis in reversed(axes if tensor.numel() else []):
                left, index = divmod(left, tensor.shape[axis])
                tensor = tensor.roll(-index, axis)
            rolled.append(tensor)
        part = at_sizes(program, rolled, sizes)
        if (integers := _few_integers(program, part)) not in met:
            met.add(integers)
            yield part
        if len(met) == PARTS:
            return


def _few_integers(program: Program, case: Inputs) -> tuple[tuple[float, ...], ...]:
    """The few integers of a case, except ids of tables of the graph, which draws vary."""
    few = (
        tensor
        for value, tensor in zip(program.graph.inputs, case, strict=False)
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.numel() >= PARTS)
        and role_of(program, value, tensor) is not Role.IDS
    )
    return tuple(tuple(tensor.flatten().tolist()) for tensor in few)


def at_sizes(program: Program, example: Inputs, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """The example repeated and cut to `sizes`. An example without rows has none to repeat: floats
    are random, and others 0."""
    resized: list[torch.Tensor] = []
    for tensor, value in zip(example, program.graph.inputs, strict=False):
        if not tensor.numel():
            fixed = zip(value.shape, tensor.shape, strict=True)
            shape = [
                evaluate_dim(dim, sizes) if symbols(dim) and symbols(dim) <= set(sizes) else size
                for dim, size in fixed
            ]
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(shape, generator=generator)
            tensor = drawn if tensor.is_floating_point() else torch.zeros(shape)
            tensor = tensor.to(example[len(resized)].dtype)
        resized.append(with_sizes(tensor, value.shape, sizes))
    return resized


def sizes_of(program: Program, example: Inputs) -> dict[str, int]:
    """The named sizes of the example."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(program.graph.inputs, example, strict=False):
        bind_shape(value.shape, tuple(tensor.shape), sizes)
    return sizes


def same_results(program: Program, eager: Eager, case: Inputs, expected: Inputs) -> bool:
    """Whether the program's outputs are `expected`, those of the module. False where the program
    cannot be evaluated. The outputs that follow them are the program's own."""
    error = _error(program, case, expected)
    if error <= default_tolerance(program.graph):
        return True
    if not rounds_to_16_bits(program.graph):
        return False
    try:
        exact = eager_in_float32(eager)(*case)
        results = in_float32(program, anywhere=True)(with_states(program, case))
    except _FAILURES:
        return False
    return error_of(results, exact) <= MEANING


def with_states(program: Program, case: Inputs) -> list[torch.Tensor]:
    """Inputs of a program's graph: a case, and the first contents of its states."""
    return [*case, *(program.weights[state.before.name] for state in program.graph.states)]


def _error(program: Program, case: Inputs, expected: Inputs) -> float:
    try:
        with torch.no_grad():
            graph, weights = program.graph, program.weights
            return error_of(evaluate_anywhere(graph, with_states(program, case), weights), expected)
    except _FAILURES:
        return math.inf


def error_of(results: Inputs, expected: Inputs) -> float:
    """The greatest distance of any result from the one expected; results beyond these are left
    out."""
    if len(results) < len(expected):
        return math.inf
    return max((distance(a, b) for a, b in zip(results, expected, strict=False)), default=0.0)
