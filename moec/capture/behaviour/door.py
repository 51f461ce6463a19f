"""Captures modules by a description of the user's, which is proved.

During the capture, the module's forward is a replacement with the same
parameters; afterwards the model is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from torch import nn

from moec.capture.behaviour.failure import Failure, shown
from moec.capture.behaviour.forward import Forward, proved_forward, require_rows
from moec.capture.behaviour.hints import Hints, describe_by_hints
from moec.capture.behaviour.layer.arguments import Arguments, RecordedCall, record
from moec.capture.behaviour.layer.parts import may_hold_experts
from moec.capture.behaviour.proof.proof import Proof
from moec.capture.behaviour.proof.side_outputs import result_like
from moec.capture.behaviour.replacement import Replacement, outputs
from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.captured import Captured
from moec.capture.speculate.refusals import Untraceable
from moec.errors import CaptureError, NoMatch, UsageError


@dataclass(frozen=True)
class Declared:
    """A user's description of the modules of a class, given as the class or its name: by hints, or
    by a forward in plain PyTorch."""

    kind: type[nn.Module] | str
    by: Hints | Forward

    @property
    def name(self) -> str:
        return self.kind if isinstance(self.kind, str) else self.kind.__name__

    def matches(self, module: nn.Module) -> bool:
        if isinstance(self.kind, str):
            return type(module).__name__ == self.kind
        return type(module) is self.kind


@dataclass(frozen=True)
class Described:
    """A module of the model, the proof of its description, and the forward that is captured instead
    of its own."""

    name: str
    module: nn.Module
    proof: Proof
    forward: Callable[..., Any]

    def __str__(self) -> str:
        what = f"{self.proof.description}; " if self.proof.description else ""
        return f"{shown(self.name, self.module)} was described by the user: {what}{self.proof}"


@dataclass(frozen=True)
class ModelExample:
    """A module with its example arguments."""

    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def record(self, names: Sequence[str]) -> dict[str, RecordedCall]:
        """How the example calls the modules of these names; modules that are not called are left
        out."""
        modules = dict(self.module.named_modules())
        return record(
            lambda: self.module(*self.args, **self.kwargs), [(n, modules[n]) for n in names]
        )


def capture_described(
    model: ModelExample,
    capture: Callable[[], Captured],
    declared: Sequence[Declared] = (),
) -> Captured:
    """The result of `capture`, with the described modules replaced by their descriptions.

    Raises CaptureError where a description is wrong, with the input that shows it, and where the
    capture fails, with the line and the module to describe.
    """
    described = _declared(model, declared)
    try:
        with replaced(described):
            captured = capture()
    except CaptureError as error:
        raise _refusal(error, model.module, described) from error
    names = tuple(item.name for item in described)
    notes = (*captured.notes, *map(str, described))
    return replace(captured, notes=notes, described=names)


@contextmanager
def replaced(described: Sequence[Described]) -> Iterator[None]:
    """While open, each described module has its replacement forward. One thread at a time."""
    with PROCESS_STATE:
        for item in described:
            item.module.forward = item.forward
        try:
            yield
        finally:
            for item in described:
                del item.module.forward


def _forward(
    module: nn.Module, arguments: Arguments, call: RecordedCall, proof: Proof
) -> Callable[..., Any]:
    assert proof.description is not None
    replacement = Replacement(module, proof.description, arguments.shape[-1])

    @wraps(module.forward)  # named_arguments reads the names of its parameters
    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens = arguments.tokens(args, kwargs)
        require_rows(tokens, proof)
        return result_like(call.result, outputs(replacement, tokens))

    return forward


def _refusal(error: CaptureError, model: nn.Module, described: Sequence[Described]) -> CaptureError:
    """The error of a capture with the user's line, and a remedy where a module around the line, or
    anywhere if none is, may be an MoE layer."""
    failure = Failure.of(error, model)
    lines = str(error).split("\n")
    if failure.line and not any(".py:" in line for line in lines):
        lines.insert(1, f"  at {failure.line}")
    modules = dict(model.named_modules())
    done = {item.name for item in described}
    layers = (n for n in failure.modules or reversed(modules) if may_hold_experts(modules[n]))
    name = next((n for n in layers if n not in done), None)
    if name is not None and (failure.line or isinstance(error, Untraceable)):
        kind = type(modules[name]).__name__
        lines.append(
            f"if {shown(name, modules[name])} is an MoE layer, describe it: "
            f"moec.describe({kind}, router=..., experts=..., top_k=...)"
        )
    return CaptureError("\n".join(lines))


def _declared(model: ModelExample, declared: Sequence[Declared]) -> list[Described]:
    described = []
    modules = dict(model.module.named_modules())
    for item in declared:
        names = [name for name, module in modules.items() if item.matches(module)]
        if not names:
            raise UsageError(f"{item.name} is described, and the model has no module of that class")
        calls = model.record(names)
        for name in names:
            if name not in calls:
                raise UsageError(f"{name}, a {item.name}, is described and never called")
            try:
                described.append(_as_declared(item, name, modules[name], calls[name]))
            except NoMatch as why:
                raise CaptureError(
                    f"{shown(name, modules[name])} is not what it is described to be: {why}"
                ) from None
    return described


def _as_declared(item: Declared, name: str, module: nn.Module, call: RecordedCall) -> Described:
    arguments = Arguments.of(call.args, call.kwargs)
    if isinstance(item.by, Hints):
        proof = describe_by_hints(module, arguments, item.by)
        return Described(name, module, proof, _forward(module, arguments, call, proof))
    proof, forward = proved_forward(module, arguments, item.by)
    return Described(name, module, proof, forward)
