"""Calls a module with other data and sizes, to see whether one call changes the results of another.

A value that only the first call sets may come from its data or sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from moec.capture.earlier_calls.check import EarlierCalls
from moec.capture.earlier_calls.parting import parting
from moec.capture.earlier_calls.runs import agree, undisturbed, words_of
from moec.capture.python_values.reach import snapshot, values_kept
from moec.capture.python_values.slots import Slot
from moec.errors import CaptureError

Tensors = Sequence[torch.Tensor]
Run = Callable[..., Any]
"""Calls the module with tensors, and returns the leaves of its result."""


def changing_with_inputs(earlier: EarlierCalls, run: Run, inputs: Sequence[Tensors]) -> list[Slot]:
    """The slots that a second call with the same of `inputs` changes.

    Each of them is given to a module without earlier calls, the first twice. Where that changes
    something, a sequence of calls has each pair of inputs. Raises CaptureError, with the user's
    line, where a call changes the results of later calls.
    """
    module = earlier.module
    fresh: list[Sequence[Any] | None] = []
    written, changing = list[Slot](), list[Slot]()
    for number, tensors in enumerate(inputs):
        with values_kept(module):
            start = snapshot(module)
            fresh.append(_results(run, tensors))
            written += start.changed(snapshot(module))
            if number == 0 and not written:
                _refuse_other(earlier, run, (tensors, tensors), (fresh[0], _results(run, tensors)))
    if not written:
        return []
    with values_kept(module):
        wrong = _first_other(run, inputs, fresh, module, changing)
    if wrong is not None:
        before, number, results = wrong
        _refuse_other(earlier, run, (inputs[before], inputs[number]), (fresh[number], results))
    return changing


def _first_other(
    run: Run,
    inputs: Sequence[Tensors],
    fresh: Sequence[Sequence[Any] | None],
    module: torch.nn.Module,
    changing: list[Slot],
) -> tuple[int, int, Sequence[Any] | None] | None:
    """The first call in the sequence with another result than `fresh`: the numbers of the inputs
    before it and of its own, and the result. Adds the slots that a second call changes."""
    turns = list(_turns(len(inputs)))
    for before, number in zip([None, *turns], turns, strict=False):
        start = snapshot(module)
        results = _results(run, inputs[number])
        if before == number:
            changing += start.changed(snapshot(module))
        if before is not None and not _agrees(fresh[number], results):
            return before, number, results
    return None


def _turns(count: int) -> Iterator[int]:
    """Numbers below `count`, such that each of them follows each other one and itself, once."""
    for one in range(count):
        yield one
        for other in range(one + 1, count):
            yield from (one, other)
    yield 0


def _results(run: Run, tensors: Tensors) -> Sequence[Any] | None:
    """The module's results; None where it refuses these inputs."""
    try:
        return list(_run(run, tensors))
    except Exception:  # whatever the module raises
        return None


def _refuse_other(
    earlier: EarlierCalls,
    run: Run,
    inputs: tuple[Tensors, Tensors],
    results: tuple[Sequence[Any] | None, Sequence[Any] | None],
) -> None:
    """Raises CaptureError where a call gives another result after a call of the first inputs."""
    if _agrees(*results):
        return
    module, (first, later) = earlier.module, inputs
    with values_kept(module):
        start = snapshot(module)
        _results(run, first)
        slots = start.changed(snapshot(module))
        line = _line(earlier, slots, partial(_run, run, later))
        start.restore(snapshot(module))
        site = parting(partial(_run, run, later), partial(_run, run, first))
    name, sizes = type(module).__name__, [_sizes(tensors) for tensors in inputs]
    if not slots:
        raise CaptureError(
            f"{name} cannot be captured: two calls with the same inputs of {sizes[0]} give "
            "different results\n  a compiled model computes the same in every call: remove what "
            "draws numbers or reads a clock"
        )
    if site is not None:
        line = f"  {site}: `{site.text}` decides it\n"
    raise CaptureError(
        f"{name} cannot be captured: its result depends on what an earlier call left in "
        f"{words_of(slots)}\n{line}"
        f"  a call with inputs of {sizes[0]} changes the result for inputs of {sizes[1]}\n"
        "  compute it in every call, or fill it before the model is compiled"
    )


def _agrees(one: Sequence[Any] | None, other: Sequence[Any] | None) -> bool:
    """Whether two results agree; a call that is refused agrees with all."""
    return one is None or other is None or agree(one, other)


def _line(earlier: EarlierCalls, slots: Sequence[Slot], run: Callable[[], Any]) -> str:
    """The line that reads one of the slots."""
    watched = EarlierCalls(earlier.module, slots, answers=earlier.answers)
    try:
        with watched.unread():
            run()
    except CaptureError as why:
        return f"{str(why).splitlines()[1]}\n"
    except Exception:  # it reads them where Python requires a number
        return ""
    return ""


def _run(run: Run, tensors: Tensors) -> Any:
    with undisturbed():
        leaves = run(*(tensor.clone() for tensor in tensors))
        # On leaving, what the run wrote is undone, also in the results.
        return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _sizes(tensors: Tensors) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
