"""Captures a module with example arguments as a program, with what is needed to call it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from moec.capture.calls.call import (
    FlatCall,
    ModuleCall,
    named_arguments,
    tensor_names,
)
from moec.capture.calls.constants import constant_numbers, noted
from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.calls.states import detached
from moec.capture.conversion.exported import structure_of
from moec.capture.decomposition import decompose
from moec.capture.export.module_export import (
    convert,
    export_call,
    export_module,
    from_start,
    symbol_names,
)
from moec.capture.guards.guard_text import guards_in_text
from moec.capture.guards.guards import guards_of
from moec.capture.proof.agreement import Eager, allow_one, refuted
from moec.capture.proof.fixed import causes, fixed, lost_axes
from moec.capture.proof.fixed import notes as fixed_notes
from moec.capture.proof.settlement import bounded, required
from moec.capture.sides import with_other_sides
from moec.capture.sizes.constant_sizes import fold_constant_sizes
from moec.capture.sizes.lengths import Axis, AxisGroup
from moec.capture.sizes.shapes import Axes, default_wishes, wished_axes, wished_bounds
from moec.capture.sizes.widening import Widened, at_lengths, widen
from moec.capture.speculate import (
    CaptureForm,
    ConvertedExport,
    Untraceable,
    masked,
    refuse_random,
    speculate,
)
from moec.errors import CaptureError
from moec.interpret.graph_module import GraphModule
from moec.interpret.outputs import Structure
from moec.ir.graph import Program
from moec.ir.sizes.dims import Bounds
from moec.runtime.process.gc_pause import gc_paused

Way = Literal["traced", "speculated", "masked"]
"""How a module was captured: "traced" by torch.export alone; "speculated", with branches on data
answered and proved; or "masked", with every row computed for every expert."""


@dataclass(frozen=True)
class Captured:
    """A captured program, and how it relates to its source.

    `eager(*tensors)` runs the source on the graph's inputs, without states, and returns the graph's
    outputs; `structure` rebuilds the source's result from them. `fixed` are notes about axes that
    cannot vary and about guards of the export. `is_graph` is True where the source is already a
    graph. `described` names the modules that were replaced by a description of their behaviour, and
    `notes` has the notes about them. `other` captures the same source in another form, for use
    where this one cannot be compiled. `way` is how the module was captured.
    """

    program: Program
    eager: Eager
    example: tuple[torch.Tensor, ...]
    structure: Structure
    fixed: tuple[str, ...] = ()
    is_graph: bool = False
    notes: tuple[str, ...] = ()
    described: tuple[str, ...] = ()
    other: Callable[[], Captured] | None = None
    way: Way = "traced"


def capture(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    bounds: Mapping[str, Bounds] | None = None,
    allow_fixed: bool | str | Collection[str] = False,
    constants: str | Collection[str] = (),
) -> Captured:
    """Export `model` with example arguments and convert it to a program.

    `dynamic_shapes` is that of torch.export; None lets batch and sequence axes vary
    (`moec.capture.sizes.shapes`). `bounds` limits sizes by name. `allow_fixed` names inputs whose
    sizes may be fixed at those of the example (True: all). `constants` names inputs that always
    have the values of the example (`moec.capture.calls.constants`). Raises CaptureError, with
    torch's reason, where the model cannot be exported, or where the example's sizes decide what
    is computed.
    """
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise CaptureError(
                "the sizes of an exported program are fixed: export it again with shapes"
            )
        return _from_export(model, args, kwargs, bounds)
    model.eval()
    if isinstance(model, GraphModule):
        return _from_graph(model, args, kwargs, dynamic_shapes)
    arguments = named_arguments(model, args, kwargs)
    kwargs = {name: kwargs[name] for name in arguments if name in kwargs}  # in the order of names
    numbers = constant_numbers(constants, tensor_names(arguments))
    call = ModuleCall(model, args, kwargs, numbers)
    names = [name for i, name in enumerate(tensor_names(arguments)) if i not in numbers]
    for name, tensor in zip(names, call.tensors, strict=True):
        _check_device(f"input {name}", tensor)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_device(name, tensor)
    if dynamic_shapes is None:
        wishes, last = default_wishes(call.tensors)
    else:
        axes = wished_axes(arguments, dynamic_shapes)
        wishes, last = [wish for i, wish in enumerate(axes) if i not in numbers], []
    request = _Request(
        call,
        wishes,
        [Axis(*axis) for axis in last],
        names,
        wished_bounds(wishes) | dict(bounds or {}),
        allow_fixed,
        noted([n for n in tensor_names(arguments) if n not in names], call.constants),
    )
    try:
        return _traced(request)
    except CaptureError as error:
        try:
            return _speculated(request)
        except Untraceable:
            raise error from error.__cause__


@dataclass(frozen=True)
class _Request:
    """What is captured.

    `wishes` has the axes of each tensor that may vary, `joining` the axes that vary only together
    with axes of other tensors, `names` the names of the tensors, `bounds` the bounds that the user
    set, `allow_fixed` the inputs that may have fixed sizes, and `notes` those on constant inputs.
    """

    call: ModuleCall
    wishes: Sequence[Axes]
    joining: Sequence[Axis]
    names: Sequence[str]
    bounds: Mapping[str, Bounds]
    allow_fixed: bool | str | Collection[str]
    notes: tuple[str, ...] = ()


def _traced(request: _Request) -> Captured:
    """Capture with torch.export alone, widening the example until graph and module agree."""
    call, wrong = request.call, list[AxisGroup]()
    special = frozenset[int]()
    while True:
        with PROCESS_STATE, gc_paused():
            refused = [group.axes for group in wrong]
            general = widen(call, request.wishes, request.joining, refused, special)
            flat = FlatCall(call)
            exported = export_call(flat, general)
            refuse_random(type(call.module).__name__, exported)
            converted = _converted(request, general, exported, flat.structure)
        # The module may compare a size with a constant that happens to be the widened length, as
        # view(2, ...) does: export once more, at another length.
        lost = () if special else lost_axes(converted.program, general.wishes)
        if lost:
            special = frozenset(general.tensors[tensor].shape[axis] for tensor, axis in lost)
            another = widen(call, request.wishes, request.joining, refused, special)
            if _shapes(another) != _shapes(general):
                continue
        more = refuted(converted.program, converted.eager, call.tensors, general)
        if not more:
            break
        wrong += more
    form = CaptureForm(converted, flat.structure)

    def recapture(other: Widened) -> CaptureForm:
        flat = FlatCall(call)
        exported = export_call(flat, other)
        return CaptureForm(_converted(request, other, exported, flat.structure), flat.structure)

    return _captured(request, general, form, "traced", recapture, partial(_speculated, request))


def _shapes(general: Widened) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in general.tensors)


def _speculated(request: _Request) -> Captured:
    """Capture with branches on data answered and proved. Raises CaptureError where one is not."""
    call = request.call
    with PROCESS_STATE, gc_paused():
        general = widen(call, request.wishes, request.joining)
    export = partial(export_module, general)
    convert = partial(_converted, request, general)
    examples = (general.tensors, call.tensors)

    def with_masks() -> Captured:
        with PROCESS_STATE, gc_paused():
            decomposed = decompose(index[1].exported)
            form = masked(decomposed, index, export, convert, examples)
        return _captured(request, general, form, "masked", again_with_masks)

    def again_with_masks(other: Widened) -> CaptureForm:
        export = partial(export_module, other)
        convert = partial(_converted, request, other)
        side = speculate(call, export, convert, (other.tensors,))
        decomposed = decompose(side[1].exported)
        return masked(decomposed, side, export, convert, (other.tensors,))

    def recapture(other: Widened, by_class: bool = True) -> CaptureForm:
        export = partial(export_module, other)
        convert = partial(_converted, request, other)
        return speculate(call, export, convert, (other.tensors,), by_class)[0]

    def in_pieces() -> Captured:
        try:
            with PROCESS_STATE, gc_paused():
                form, _ = speculate(call, export, convert, examples, by_class=False)
        except CaptureError:
            return with_masks()
        split = partial(recapture, by_class=False)
        return _captured(request, general, form, "speculated", split, with_masks)

    with PROCESS_STATE, gc_paused():
        index = speculate(call, export, convert, examples)
    other = in_pieces if index[1].lists_classes else with_masks
    return _captured(request, general, index[0], "speculated", recapture, other)


def _converted(
    request: _Request, general: Widened, exported: ExportedProgram, structure: Structure
) -> ConvertedExport:
    """The program of an export. Reads the guards first, because decomposition adds more."""
    guards = guards_of(exported, symbol_names(exported, general.wishes, general.groups))
    fixings = causes(exported)
    program = convert(
        exported, request.names, general.wishes, request.bounds, structure.names, general.groups
    )
    program, states = detached(program)
    eager = from_start(states, request.call, structure)
    return ConvertedExport(program, eager, guards, fixings)


def _captured(
    request: _Request,
    general: Widened,
    form: CaptureForm,
    way: Way,
    recapture: Callable[[Widened], CaptureForm],
    other: Callable[[], Captured] | None = None,
) -> Captured:
    """The captured form, with the bounds that guards and sizes of 1 set. `again` captures it at
    other sizes, for branches on sizes. Raises CaptureError where the example's sizes decide what is
    computed."""
    name, inputs = type(request.call.module).__name__, form.converted.program.graph.inputs

    def at_sizes(sizes: Mapping[str, int]) -> CaptureForm:
        with PROCESS_STATE, gc_paused():
            return recapture(at_lengths(general, inputs, sizes))

    form, settlement = with_other_sides(name, form, general.tensors, at_sizes, request.bounds)
    converted, notes = form.converted, settlement.notes
    eager, tensors = converted.eager, general.tensors
    program = bounded(converted.program, settlement)
    program = allow_one(program, request.bounds, eager, (tensors, request.call.tensors))
    program = fold_constant_sizes(program)
    always = fixed(
        name, program, eager, tensors, general.wishes, request.allow_fixed, converted.fixings
    )
    example = request.call.tensors
    remarks = (*request.notes, *always, *notes, *form.notes)
    return Captured(program, eager, example, form.structure, remarks, other=other, way=way)


def _check_device(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise CaptureError(f"{name} has no data (it is on the meta device); load the weights first")
    if tensor.device.type != "cpu":
        raise CaptureError(f"{name} is on {tensor.device}; move it to the CPU")


def _from_export(
    exported: ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    bounds: Mapping[str, Bounds] | None,
) -> Captured:
    """Capture an ExportedProgram of the user's, with the sizes that it declares.

    Without arguments, the example inputs stored in it are used; without those, the example is
    empty. Raises CaptureError where the arguments have another structure.
    """
    spec = exported.call_spec.in_spec
    if args or kwargs:
        arguments = (tuple(args), dict(kwargs))
        if pytree.tree_structure(arguments) != spec:
            raise CaptureError(
                "the exported program was not exported with arguments such as these: it takes "
                f"{', '.join(map(str, exported.graph_signature.user_inputs))}"
            )
    else:
        arguments = exported.example_inputs or ((), {})
    example = _tensors(arguments)
    names = [str(name) for name in exported.graph_signature.user_inputs]
    guards = guards_in_text(exported, symbol_names(exported, [{} for _ in names]))
    module = exported.module(check_guards=False)

    def run(*tensors: torch.Tensor) -> Any:
        positional, named = pytree.tree_unflatten(list(tensors), spec)
        return module(*positional, **named)

    structure = structure_of(exported)
    program = convert(exported, names, [{} for _ in names], bounds or {}, structure.names)
    program, states = detached(program)
    eager = from_start(states, run, structure)
    program, notes = required("the exported program", program, guards, example)
    program = fold_constant_sizes(program)
    always = fixed_notes(program, len(names))
    return Captured(program, eager, example, structure, (*always, *notes))


def _from_graph(
    model: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> Captured:
    """Capture a module that is a graph already: nothing is traced; its current weights are used."""
    if dynamic_shapes is not None:
        raise CaptureError(
            "the sizes of a transformed module are fixed: transform it again with shapes"
        )
    example = model.inputs(args, kwargs)

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return model.run(tensors)

    return Captured(model.program, eager, example, model.structure, is_graph=True)


def _tensors(tree: Any) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
