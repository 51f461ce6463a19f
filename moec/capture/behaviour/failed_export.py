"""The conditions on sizes that an export evaluated before it failed."""

from __future__ import annotations

import torch

from moec.capture.behaviour.failure import frames
from moec.capture.sizes.guards import Guard, guards_in
from moec.capture.sizes.settle import GuardRefused
from moec.capture.sizes.widen import Widened
from moec.capture.sizes.wishes import name_symbols


def guards_before(error: BaseException) -> tuple[Guard, ...]:
    """The guards that an error of a capture is about, and those of the exports that failed: what
    the module's code does at other sizes.

    torch drops the latter with its error. They are in its frames, under the name that it gives to
    the inputs of a trace; where torch has another name for them, none are found.
    """
    guards: dict[Guard, None] = {}
    general: Widened | None = None
    for frame, _ in frames(error):
        widened = frame.f_locals.get("general")
        general = widened if isinstance(widened, Widened) else general
        inputs = frame.f_locals.get("fake_args")
        if general is not None and isinstance(inputs, tuple):
            guards |= dict.fromkeys(_guards_of(inputs, general))
    earlier: BaseException | None = error
    while earlier is not None:
        if isinstance(earlier, GuardRefused):
            guards[earlier.guard] = None
        earlier = earlier.__cause__ or earlier.__context__
    return tuple(guards)


def _guards_of(inputs: tuple[object, ...], general: Widened) -> tuple[Guard, ...]:
    tensors = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
    sizes = [n for tensor in tensors for n in tensor.shape if isinstance(n, torch.SymInt)]
    if len(tensors) != len(general.wishes) or not sizes:
        return ()
    names = name_symbols(tensors, general.wishes, [group.axes for group in general.groups])
    return guards_in(sizes[0].node.shape_env, names)  # type: ignore[attr-defined]
