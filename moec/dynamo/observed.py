"""Gives a forward that Dynamo can capture to modules whose loop over experts it cannot.

A loop may branch on its data (`if rows.numel():`, `for count in counts.tolist()`). Where Dynamo
gives up on such a module, its behaviour is recognised (`moec.capture.behaviour`), and its forward
becomes the description as plain operators with the module's own parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.door import ModelExample
from moec.capture.behaviour.layer.arguments import Arguments, RecordedCall
from moec.capture.behaviour.layer.description import Description
from moec.capture.behaviour.layer.parts import may_hold_experts
from moec.capture.behaviour.proof.side_outputs import result_like
from moec.capture.behaviour.recognise import NoExperts, recognise
from moec.capture.behaviour.replacement import Replacement, outputs
from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.earlier_calls.other_inputs import counts_with_inputs
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.capture.state.reach import values_kept
from moec.dynamo.forwards import previous_forward, replace_forward
from moec.dynamo.record import Fallback
from moec.dynamo.structure import ModuleStructure
from moec.errors import CaptureError, NoMatch
from moec.interpret.resized import resize_axis
from moec.torch_private import dynamo, pytree


@dataclass(frozen=True)
class Observed:
    """What a module of this structure computes of tokens of this rank and dtype, in this mode: in
    16 bits, a router may compute in float32. `body` is the graph of an expert, `result` the
    containers of the module's result."""

    description: Description
    body: str
    width: int
    rank: int
    dtype: torch.dtype
    training: bool
    result: Any
    structure: ModuleStructure

    def covers(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if len(args) != 1 or kwargs or module.training != self.training:
            return False
        tokens = args[0]
        return (
            isinstance(tokens, torch.Tensor)
            and tokens.dim() == self.rank
            and tokens.dtype is self.dtype
            and self.structure.is_that_of(module)
        )


_NAME = "observed"
_OBSERVED = "moec_observed"


def is_observed(module: nn.Module) -> bool:
    return _OBSERVED in module.__dict__


def observe_experts(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Fallback]:
    """Replaces the forward of each module that holds experts, that Dynamo cannot capture, and that
    is recognised by its behaviour. Returns the others that Dynamo cannot capture, with reasons."""
    modules = {name: part for name, part in model.named_modules() if may_hold_experts(part)}
    with values_kept(model):
        calls = ModelExample(model, args, kwargs).record(list(modules))
    settled: list[str] = []
    refusals = []
    for name in reversed(modules):
        if name not in calls or any(_inside(other, name) for other in settled):
            continue
        module, call = modules[name], calls[name]
        try:
            if _captured(module, call):
                settled.append(name)
                continue
            module.__dict__[_OBSERVED] = _observed(module, call)
            replace_forward(module, _NAME, forward)
            settled.append(name)
        except NoExperts:
            continue
        except NoMatch as why:
            kind = type(module).__name__
            where = f"{name} ({kind})" if name else kind
            reason = f"Dynamo does not capture it, and its behaviour is not recognised: {why}"
            refusals.append((name, Fallback(where, reason)))
    return [
        fallback
        for name, fallback in refusals
        if not any(_inside(name, other) or _inside(other, name) for other in settled)
    ]


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that was observed, which is its own for calls of another kind."""
    observed: Observed = self.__dict__[_OBSERVED]
    if not observed.covers(self, args, kwargs):
        return previous_forward(self, _NAME, *args, **kwargs)
    replacement = Replacement(self, observed.description, observed.width, observed.body)
    return result_like(observed.result, outputs(replacement, args[0]))


def _observed(module: nn.Module, call: RecordedCall) -> Observed:
    """Raises NoMatch where the behaviour is not recognised, or needs more than tokens."""
    arguments = Arguments.of(call.args, call.kwargs)
    if len(call.args) != 1 or call.kwargs:
        raise NoMatch("it is called with other arguments than its tokens, or by keyword")
    try:
        earlier = earlier_calls(module, call.args, call.kwargs)
        if earlier.slots:
            words = " and ".join(slot.words for slot in earlier.slots[:2])
            raise NoMatch(
                f"its calls set {words}, which a description does not do; return "
                "the value, or set it only where the module is training"
            )
        with PROCESS_STATE:
            counts_with_inputs(module, partial(_leaves, module), _inputs(call.args[0]))
        with PROCESS_STATE, values_kept(module):
            description = recognise(module, arguments).description
    except CaptureError as why:
        raise NoMatch(" ".join(str(why).split("\n")[:2])) from None
    assert description is not None
    replacement = Replacement(module, description, arguments.shape[-1])
    leaves = [None] * len(description.outputs)
    return Observed(
        description,
        replacement.body,
        arguments.shape[-1],
        len(arguments.shape),
        call.args[0].dtype,
        module.training,
        result_like(call.result, leaves),
        ModuleStructure.of(module),
    )


def _leaves(module: nn.Module, tokens: torch.Tensor) -> list[Any]:
    return list(pytree.tree_leaves(module(tokens)))


def _inputs(tokens: torch.Tensor) -> list[Sequence[torch.Tensor]]:
    """The tokens, more of them with large values, and one with its signs changed."""
    axis = max(tokens.ndim - 2, 0)
    more = resize_axis(tokens, axis, 2 * tokens.shape[axis] + 3) * 30
    return [[more], [tokens], [-resize_axis(tokens, axis, 1)]]


def _captured(module: nn.Module, call: RecordedCall) -> bool:
    """Whether Dynamo makes one graph of the module, as it does in a prepared model."""
    try:
        patch = dynamo.config.patch(capture_dynamic_output_shape_ops=True)
        with values_kept(module), patch, torch.no_grad():
            dynamo.export(module)(*call.args, **call.kwargs)
    except Exception:  # its errors have no common class; the module's own are those of eager
        return False
    return True


def _inside(inner: str, outer: str) -> bool:
    return inner == outer or not outer or inner.startswith(f"{outer}.")
