"""Calls a module with other data and sizes, to see whether one call changes the results of another.

A value that only the first call sets may come from its data or sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """The slots that change with every call of some of `inputs`; the first are called twice.

    Raises CaptureError, with the user's line, where a call changes the results of later calls.
    """
    module = earlier.module
    fresh: list[Sequence[Any] | None] = []
    written, changing = list[Slot](), list[Slot]()
    for number, tensors in enumerate(inputs):
        with values_kept(module):
            start = snapshot(module)
            fresh.append(_results(run, tensors))
            first = snapshot(module)
            written += start.changed(first)
            if number == 0 or start.changed(first):
                again = _results(run, tensors)
                changing += first.changed(snapshot(module))
                _refuse_other(earlier, run, (tensors, tensors), (fresh[-1], again))
    for first_tensors in inputs if written else ():
        for tensors, result in zip(inputs, fresh, strict=True):
            if first_tensors is not tensors:
                with values_kept(module):
                    _results(run, first_tensors)
                    later = _results(run, tensors)
                _refuse_other(earlier, run, (first_tensors, tensors), (result, later))
    return changing


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
    one, other = results
    if one is None or other is None or agree(one, other):
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
