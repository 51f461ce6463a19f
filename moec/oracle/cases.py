"""Inputs on which a program is compared with its module, in each of which every input varies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch

from moec.ir.graph import Program
from moec.ir.interpret.outputs import VaryingOutput
from moec.oracle.draws import DRAWS, INFINITE, Draw, Role, is_factor, role_of, values_of

Inputs: TypeAlias = Sequence[torch.Tensor]
Case: TypeAlias = tuple[torch.Tensor, ...]
Result = TypeVar("Result")
Run: TypeAlias = Callable[..., Result]
Eager: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]
"""A module as a function of the inputs of its graph, to the outputs of the graph."""


_SEED = 8191
"""Not 0: a module that was built after torch.manual_seed(0) would get its own weights as inputs."""


def few_draws(program: Program, example: Inputs) -> Sequence[Draw]:
    """Draws for comparisons at many sizes: three, and two more where a mask is added to scores; two
    where no input is a mask, a length or a number; none where there are no elements to draw."""
    if not any(tensor.numel() for tensor in example):
        return ()
    pairs = zip(program.graph.inputs, example, strict=False)
    added = [t for v, t in pairs if role_of(program, v, t) is Role.FLOAT_MASK and not is_factor(t)]
    infinite = INFINITE if added else ()
    return (*DRAWS[:3], *infinite) if other_roles(program, example) else DRAWS[:2]


def other_roles(program: Program, example: Inputs) -> set[Role | None]:
    """What inputs are for, other than hidden states and ids of a table."""
    pairs = zip(program.graph.inputs, example, strict=False)
    roles = {role_of(program, value, tensor) for value, tensor in pairs}
    return roles - {Role.TOKENS, Role.IDS, None}


def cases(
    program: Program, example: Inputs, run: Run[Result], draws: Sequence[Draw] | None = None
) -> Iterator[tuple[Case, Result]]:
    """The example, then draws of its sizes (`few_draws`), each with the result of `run`; those that
    the module refuses are left out. Raises VaryingOutput as `run` does."""
    for draw in (None, *(few_draws(program, example) if draws is None else draws)):
        accepted = (
            _run(run, example) if draw is None else drawn_and_run(program, example, run, draw)
        )
        if accepted is not None:
            yield accepted


def drawn_and_run(
    program: Program, example: Inputs, run: Run[Result], draw: Draw
) -> tuple[Case, Result] | None:
    """The inputs of a draw and the result of `run` for them.

    Where the module refuses them, each input has the first of its values that the module accepts
    beside those before it. None where it accepts only the example, or not even that.
    """
    accepted = _run(run, drawn(program, example, draw))
    if accepted is not None or _run(run, example) is None:
        return accepted
    inputs = list(example)
    for number, values in enumerate(_options(program, example, draw)):
        for value in values:
            tried = _run(run, [*inputs[:number], value, *inputs[number + 1 :]])
            if tried is not None:
                inputs[number], accepted = value, tried
                break
    return accepted


def drawn(program: Program, example: Inputs, draw: Draw) -> Case:
    """The inputs of a draw, which the module may refuse."""
    options = _options(program, example, draw)
    return tuple(next(values, tensor) for values, tensor in zip(options, example, strict=True))


def _options(program: Program, example: Inputs, draw: Draw) -> list[Iterator[torch.Tensor]]:
    seeds = (_SEED + 31 * draw.number + i for i in range(len(example)))
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return [values_of(program, i, example, draw, g) for i, g in enumerate(generators)]


def _run(run: Run[Result], inputs: Inputs) -> tuple[Case, Result] | None:
    """Inputs and the result for them; None where the module refuses them. A module that writes
    into its inputs writes into copies."""
    try:
        return tuple(inputs), run(*(tensor.clone() for tensor in inputs))
    except VaryingOutput:
        raise
    except Exception:  # whatever the user's code raises
        return None


def shapes(case: Inputs) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in case)
