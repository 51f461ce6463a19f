"""What is captured: a call of a module, the axes that may vary, and what the user asked for."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.capture.calls.call import ModuleCall
from moec.capture.calls.constants import constant_numbers, noted
from moec.capture.sizes.axis_groups import Axis
from moec.capture.sizes.wishes import Axes, default_wishes, wished_axes, wished_bounds
from moec.errors import CaptureError
from moec.ir.interpret.call_signature import CallSignature, bound_arguments, leaves_of
from moec.ir.sizes.dims import Bounds


@dataclass(frozen=True)
class CaptureRequest:
    """A call of a module, and how general its program has to be.

    `wishes` has the axes of each tensor that may vary, `joining` the axes that vary only together
    with axes of other tensors, `names` the names of the tensors, `bounds` the bounds that the user
    set, `allow_fixed` the inputs that may have fixed sizes, `signature` how other calls bind, and
    `notes` those on constant inputs.
    """

    call: ModuleCall
    wishes: Sequence[Axes]
    joining: Sequence[Axis]
    names: Sequence[str]
    bounds: Mapping[str, Bounds]
    allow_fixed: bool | str | Collection[str]
    signature: CallSignature
    notes: tuple[str, ...] = ()

    @property
    def module_name(self) -> str:
        return type(self.call.module).__name__


def request_of(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    dynamic_shapes: Any,
    bounds: Mapping[str, Bounds],
    allow_fixed: bool | str | Collection[str],
    constants: str | Collection[str],
) -> CaptureRequest:
    """The request for a call of `model`; the other parameters are those of `capture`.

    Raises CaptureError for tensors and weights that are not on the CPU.
    """
    forward = inspect.signature(model.forward)
    try:
        arguments = bound_arguments(forward, args, kwargs)
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__}.forward: {error}") from None
    leaves = list(leaves_of(arguments))
    kwargs = {name: kwargs[name] for name in arguments if name in kwargs}  # in the order of names
    all_names = [name for name, leaf in leaves if isinstance(leaf, torch.Tensor)]
    numbers = constant_numbers(constants, all_names)
    call = ModuleCall(model, args, kwargs, numbers)
    names = [name for i, name in enumerate(all_names) if i not in numbers]
    fixed = {name: leaf for name, leaf in leaves if name not in names}
    plain = [p.replace(annotation=p.empty) for p in forward.parameters.values()]
    signature = CallSignature(inspect.Signature(plain), dict(zip(names, names, strict=True)), fixed)
    for name, tensor in zip(names, call.tensors, strict=True):
        _check_device(f"input {name}", tensor)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_device(name, tensor)
    if dynamic_shapes is None:
        wishes, last = default_wishes(call.tensors)
    else:
        axes = wished_axes(arguments, dynamic_shapes)
        wishes, last = [wish for i, wish in enumerate(axes) if i not in numbers], []
    return CaptureRequest(
        call,
        wishes,
        [Axis(*axis) for axis in last],
        names,
        {**wished_bounds(wishes), **bounds},
        allow_fixed,
        signature,
        noted([name for name in all_names if name not in names], call.constants),
    )


def _check_device(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise CaptureError(f"{name} has no data (it is on the meta device); load the weights first")
    if tensor.device.type != "cpu":
        raise CaptureError(f"{name} is on {tensor.device}; move it to the CPU")
