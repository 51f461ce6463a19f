"""`moec.describe`: a forward of the user's, which is captured in place of a module's own.

The forward is captured alone, at the module's arguments in the model's example, and its graph is
compared with the module's own forward. During the capture of the model the module has the user's
forward; afterwards the model is unchanged.
"""

from __future__ import annotations

import inspect
import linecache
import math
import sysconfig
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moec import errors
from moec.capture.behaviour.recorded import ExampleCall, ModelExample, may_hold_experts
from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.capture import capture
from moec.capture.captured import Captured
from moec.capture.speculate.refusals import Untraceable
from moec.capture.state.reach import values_kept
from moec.errors import CaptureError, NoMatch, UsageError
from moec.ir.graph import Module
from moec.ir.interpret.run_in_float32 import eager_in_float32, wide, widened
from moec.ir.sizes.thresholds import nearest_allowed
from moec.oracle.agree import agree, at_sizes, sizes_of
from moec.oracle.cases import shapes
from moec.oracle.draws import DRAWS
from moec.torch_private import pytree

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_FRAMEWORKS = tuple(str(Path(package.__file__ or "").parent) for package in (torch, errors))


@dataclass(frozen=True)
class Line:
    """A line of source code."""

    file: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{Path(self.file).name}:{self.line}" + (f", `{text}`" if text else "")


def shown(name: str, module: nn.Module) -> str:
    """A module as it is named in messages: its name, its class, and the line of its forward."""
    kind = type(module)
    try:
        file = inspect.getsourcefile(kind.forward) or ""
        where = f" ({Path(file).name}:{inspect.getsourcelines(kind.forward)[1]})"
    except (OSError, TypeError):
        where = ""
    return f"{name or 'the model'}, a {kind.__name__}{where},"


@dataclass(frozen=True)
class Failure:
    """Names of the running modules, innermost first, and the user's last line."""

    modules: tuple[str, ...]
    line: Line | None

    @staticmethod
    def of(error: BaseException, model: nn.Module) -> Failure:
        names = {id(module): name for name, module in model.named_modules()}
        running: list[str] = []
        line = None
        for frame, number in frames(error):
            subject = frame.f_locals.get("self")
            if isinstance(subject, nn.Module) and id(subject) in names:
                running.append(names[id(subject)])
            file = frame.f_code.co_filename
            if not is_library(file):
                line = Line(file, number)
        return Failure(tuple(dict.fromkeys(reversed(running))), line)


def is_library(file: str) -> bool:
    """Whether a file belongs to torch, moec or the standard library. Installed packages are inside
    the standard library's folder, but do not belong to it."""
    python = file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
    return python or file.startswith((*_FRAMEWORKS, "<"))


def frames(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    """The frames of an error and of the errors that caused it, the earliest error first."""
    earlier = error.__cause__ or error.__context__
    if earlier is not None and earlier is not error:
        yield from frames(earlier)
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


Forward = Callable[..., Any]
"""Called with the module, then with the arguments of the module's own forward."""

MOST_TOKENS = 4096
"""The most tokens of a call that are compared; the compiled model refuses more."""
_SIZES = (1, 2, 3, 29, 257)
_SCALES = (1, 0.01, 1000)


@dataclass(frozen=True)
class Declared:
    """A user's forward for the modules of a class, given as the class or its name."""

    kind: type[nn.Module] | str
    forward: Forward

    @property
    def name(self) -> str:
        return self.kind if isinstance(self.kind, str) else self.kind.__name__

    def matches(self, module: nn.Module) -> bool:
        if isinstance(self.kind, str):
            return type(module).__name__ == self.kind
        return type(module) is self.kind


def describe(kind: type[nn.Module] | str, *, forward: Forward) -> Declared:
    """Describe what modules of the class `kind` (or of that name) compute, by a function in plain
    PyTorch, `forward(module, *args, **kwargs)`, for `moec.compile(descriptions=[...])`.

    The compilation compares it with the forward of each module of the class; where they differ, it
    raises CaptureError with the sizes of the inputs. Raises UsageError for what is no class or no
    function.
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UsageError(f"{kind!r} is no class of modules: give the class, or its name")
    if not callable(forward):
        raise UsageError(f"forward is {forward!r}: give a function of a module and its inputs")
    return Declared(kind, forward)


@dataclass(frozen=True)
class Described:
    """A module of the model, and the forward that is captured instead of its own. `compared` is
    how many inputs were."""

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    compared: int = 0

    def __str__(self) -> str:
        return (
            f"{shown(self.name, self.module)} was described by the user: its forward and the "
            f"user's agree at {self.compared} sizes with {len(DRAWS)} kinds of values, up to "
            f"{MOST_TOKENS} tokens; more are refused"
        )


def capture_described(
    model: ModelExample, capture: Callable[[], Captured], declared: Sequence[Declared] = ()
) -> Captured:
    """The result of `capture`, with the described modules replaced by their descriptions.

    Raises CaptureError where a description is wrong, with the input that shows it, and where the
    capture fails, with the line and the module to describe.
    """
    described = _declared(model, declared)
    try:
        return _captured(described, capture) if described else capture()
    except CaptureError as error:
        raise _refusal(error, model.module, described) from error


def _captured(described: Sequence[Described], capture: Callable[[], Captured]) -> Captured:
    """A capture with the users' forwards. It has no programs for other sizes: these are captured
    later, when the modules have their own forwards again."""
    with replaced(described):
        captured = capture()
    again = captured.other
    return replace(
        captured,
        notes=(*captured.notes, *map(str, described)),
        described=tuple(item.name for item in described),
        beyond=(),
        other=None if again is None else partial(_captured, described, again),
    )


@contextmanager
def replaced(described: Sequence[Described]) -> Iterator[None]:
    """While open, each described module has the user's forward. One thread at a time."""
    with PROCESS_STATE:
        for item in described:
            item.module.forward = item.forward
        try:
            yield
        finally:
            for item in described:
                del item.module.forward


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
            f"moec.describe({kind}, forward=...)"
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
                described.append(_proved(item.forward, name, modules[name], calls[name]))
            except NoMatch as why:
                raise CaptureError(
                    f"{shown(name, modules[name])} is not what it is described to be: {why}"
                ) from None
    return described


def _proved(forward: Forward, name: str, module: nn.Module, call: ExampleCall) -> Described:
    """Raises NoMatch, with the sizes of the first inputs on which the two forwards differ."""
    rows = _rows_of(call)

    @wraps(module.forward)  # named_arguments reads the names of its parameters
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if rows(args, kwargs) > MOST_TOKENS:  # in an export a guard, which bounds the sizes
            raise NoMatch(f"it was compared with eager for at most {MOST_TOKENS} tokens")
        return forward(module, *args, **kwargs)

    item = Described(name, module, bounded)
    try:
        with replaced([item]), values_kept(module):
            captured = capture(module, call.args, call.kwargs)
    except CaptureError as error:
        raise NoMatch(f"the user's forward is not captured: {error}") from error
    # In 16 bits a tolerance would hide another rule of the routing.
    program, eager = widened(Module.of(captured.program)).main, eager_in_float32(captured.eager)
    compared = 0
    with PROCESS_STATE, values_kept(module):  # the module has its own forward again
        for inputs in _inputs(captured, rows(call.args, call.kwargs)):
            agrees = agree(program, eager, list(map(wide, inputs)), DRAWS)
            if agrees is False:
                raise NoMatch(f"the two forwards differ on inputs of {shapes(inputs)}")
            compared += agrees is True
    if not compared:
        raise NoMatch("its own forward runs on no inputs")
    return replace(item, compared=compared)


def _rows_of(call: ExampleCall) -> Callable[[Any, Any], int]:
    """The number of tokens of a call: the rows of the first float [.., D] among its arguments.
    Raises NoMatch where there is none."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    floats = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() > 1
    ]
    if not floats:
        raise NoMatch("none of its arguments are tokens, floats of shape [.., D]")
    position = floats[0]
    return lambda args, kwargs: math.prod(pytree.tree_leaves((args, kwargs))[position].shape[:-1])


def _inputs(captured: Captured, rows: int) -> Iterator[Sequence[torch.Tensor]]:
    """The example, as it is and scaled, then with its sizes changed, all and one by one, up to
    MOST_TOKENS tokens."""
    program, example = captured.program, captured.example
    sizes, bounds = sizes_of(program, example), program.graph.bounds
    for scale in _SCALES:
        yield [t * scale if t.is_floating_point() else t for t in example]
    others = [dict.fromkeys(sizes, size) for size in _SIZES[:3]]
    for name, size in sizes.items():
        farthest = MOST_TOKENS * size // max(rows, 1)
        others += [{**sizes, name: min(other, farthest)} for other in (*_SIZES, farthest)]
    met = [sizes]
    for changed in (nearest_allowed(bounds, other) for other in others):
        if changed not in met:
            met.append(changed)
            yield at_sizes(program, example, changed)
