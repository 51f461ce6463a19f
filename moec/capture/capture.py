"""Captures a module with example arguments as a program, with what is needed to call it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.calls.states import detached
from moec.capture.calls.trials import Trials
from moec.capture.captured import Beyond, Captured
from moec.capture.conversion.exported import structure_of
from moec.capture.conversion.index_requirements import with_asserted
from moec.capture.export.module_export import convert, from_start, symbol_names
from moec.capture.repeated import capture_repeated
from moec.capture.request import CaptureRequest, request_of
from moec.capture.sizes.axis_groups import AxisGroup
from moec.capture.sizes.fixed_axes import fixed, fold_constant_sizes, lost_axes
from moec.capture.sizes.fixed_axes import notes as fixed_notes
from moec.capture.sizes.guard_text import guards_in_text
from moec.capture.sizes.guards import CaptureForm
from moec.capture.sizes.least_sizes import LeastSizes
from moec.capture.sizes.settle import settled
from moec.capture.sizes.sides import sizes_beyond, with_other_sides
from moec.capture.sizes.widen import Widened, at_lengths, excluded, fixed_at_one, refuted, widen
from moec.capture.speculate import SpeculatedForm, Untraceable
from moec.capture.ways import (
    BY_CLASS,
    IN_PIECES,
    MASKED,
    TRACED,
    CaptureWay,
    WidenedForm,
    masked_form,
    remembering,
    speculated_form,
)
from moec.errors import CaptureError
from moec.ir.interpret.graph_module import GraphModule
from moec.ir.sizes.dims import Bounds
from moec.oracle.agree import agree
from moec.oracle.cases import shapes
from moec.oracle.draws import constant_masks
from moec.runtime.process.gc_pause import gc_paused
from moec.torch_private import pytree


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
    (`moec.capture.sizes.wishes`). `bounds` limits sizes by name. `allow_fixed` names inputs whose
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
        return capture_export(model, args, kwargs, bounds)
    model.eval()
    if isinstance(model, GraphModule):
        return capture_graph(model, args, kwargs, dynamic_shapes)
    request = request_of(
        model,
        args,
        kwargs,
        dynamic_shapes=dynamic_shapes,
        bounds=bounds or {},
        allow_fixed=allow_fixed,
        constants=constants,
    )
    general = _widened(request)
    traced = partial(_traced, request, general)
    try:
        return capture_repeated(request, traced) or traced()
    except CaptureError as error:
        try:
            return _speculated(request, general)
        except Untraceable:
            raise error from error.__cause__


def _traced(
    request: CaptureRequest, first: Widened, refuted_before: Sequence[AxisGroup] = ()
) -> Captured:
    """Capture with torch.export alone, at the lengths of `first`, and at others until graph and
    module agree, without the groups that were refuted before."""
    wrong = list(refuted_before)
    general = _widened(request, wrong, first=first) if wrong else first
    special = frozenset[int]()
    while True:
        with PROCESS_STATE, gc_paused():
            form = TRACED.capture_at(request, general)
        program, eager = form.converted.program, form.converted.eager
        # The module may compare a size with a constant that happens to be the widened length, as
        # view(2, ...) does: export once more, at another length.
        lost = () if special else lost_axes(program, general.wishes)
        if lost:
            special = frozenset(general.tensors[tensor].shape[axis] for tensor, axis in lost)
            longer = _widened(request, wrong, special, general.first)
            if _shapes(longer) != _shapes(general):
                general = longer
                continue
        more = refuted(program, eager, request.call.tensors, general)
        if not more:
            break
        wrong += more
        general = _widened(request, wrong, special, first)
    if agree(program, eager, general.tensors) is False:
        raise CaptureError(
            f"{request.module_name}: its exported graph computes other values than the module, on "
            f"drawn inputs {shapes(general.tensors)}: the values of an input decide what is "
            "computed; use torch.where in place of Python's conditions"
        )
    other = partial(_speculated, request, first)
    captured = _captured(request, WidenedForm(remembering(TRACED), general, form), other)
    example = excluded(captured.program, request.call.tensors, general, request.bounds)
    return _traced(request, first, (*wrong, *example)) if example else captured


def _widened(
    request: CaptureRequest,
    refused: Sequence[AxisGroup] = (),
    special: Collection[int] = (),
    first: Widened | None = None,
) -> Widened:
    """The example of a request at general lengths, with neither the groups `refused` nor the
    lengths `special`. Those of `first` have a program of their own."""
    axes = [group.axes for group in refused]
    with PROCESS_STATE, gc_paused():
        general = widen(request.call, request.wishes, request.joining, axes, special)
    return replace(general, first=first)


def _shapes(general: Widened) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in general.tensors)


def _speculated(
    request: CaptureRequest, first: Widened, wrong: Sequence[AxisGroup] = ()
) -> Captured:
    """Capture with branches on data answered and proved, at the lengths of `first` or without the
    groups `wrong`, which excluded the example. Raises CaptureError where one is not proved."""
    general = _widened(request, wrong, first=first) if wrong else first
    with PROCESS_STATE, gc_paused():
        rows = speculated_form(request, general, request.call.tensors)
    next_way = _in_pieces if rows.traced.lists_classes else _masked
    other = partial(next_way, request, general, rows)
    captured = _captured(request, WidenedForm(remembering(BY_CLASS), general, rows.form), other)
    groups = excluded(captured.program, request.call.tensors, general, request.bounds)
    return _speculated(request, first, (*wrong, *groups)) if groups else captured


def _in_pieces(request: CaptureRequest, general: Widened, rows: SpeculatedForm) -> Captured:
    """Capture with pieces of sorted rows in place of `rows` of each class, or with masks where that
    cannot be proved."""
    masks = partial(_masked, request, general, rows)
    try:
        with PROCESS_STATE, gc_paused():
            pieces = speculated_form(request, general, request.call.tensors, by_class=False)
    except CaptureError:
        return masks()
    return _captured(request, WidenedForm(remembering(IN_PIECES), general, pieces.form), masks)


def _masked(request: CaptureRequest, general: Widened, rows: SpeculatedForm) -> Captured:
    """Capture with masks in place of `rows` of each class. Raises CaptureError where masks cannot
    express what the module does with rows."""
    with PROCESS_STATE, gc_paused():
        form = masked_form(request, general, rows, request.call.tensors)
    return _captured(request, WidenedForm(remembering(MASKED), general, form))


def _captured(
    request: CaptureRequest,
    widened: WidenedForm,
    other: Callable[[], Captured] | None = None,
    example: Sequence[torch.Tensor] | None = None,
) -> Captured:
    """The form with the bounds that guards and sizes of 1 set, and with the other sides of branches
    on sizes. `other` captures the request in the next way; `example` is the request's by default.
    Raises CaptureError where the example's sizes decide what is computed."""
    name, way, general = request.module_name, widened.way, widened.general
    inputs, tensors = widened.form.converted.program.graph.inputs, general.tensors
    example = request.call.tensors if example is None else example

    def at_sizes(sizes: Mapping[str, int]) -> CaptureForm:
        with PROCESS_STATE, gc_paused():
            return way.capture_at(request, at_lengths(general, inputs, sizes))

    form, settlement = with_other_sides(name, widened.form, tensors, at_sizes, request.bounds)
    eager, fixings = form.converted.eager, form.converted.fixings
    program = settlement.bounded(form.converted.program)
    examples = (tensors, example)
    least = LeastSizes(program, eager, examples, form.converted.guards)
    program = least.bounded(fixed=request.bounds)
    program = fold_constant_sizes(program)
    program = replace(program, graph=with_asserted(program.graph, program.weights))
    masks = constant_masks(program, example)
    always = fixed(name, program, eager, tensors, general.wishes, request.allow_fixed, fixings)
    other_lengths = [
        fixed_at_one(at_lengths(general, inputs, sizes))
        for sizes in sizes_beyond(
            program, settlement.limiting, form.converted.guards, tensors, request.bounds
        )
    ] + ([general.first] if general.first else [])
    return Captured(
        program,
        eager,
        tuple(example),
        form.structure,
        (*request.notes, *always, *settlement.notes, *form.notes, *masks),
        other=other,
        way=way.name,
        signature=request.signature.of(value.name for value in program.graph.inputs),
        beyond=tuple(_beyond(request, way, lengths) for lengths in other_lengths),
    )


def _beyond(request: CaptureRequest, way: CaptureWay, general: Widened) -> Beyond:
    """The lengths of `general`, at which the request may be captured in this way."""

    def capture_there() -> Captured:
        if not Trials(request.call).runs(general.tensors):
            raise CaptureError(f"{request.module_name} runs at none of these sizes")
        with PROCESS_STATE, gc_paused():
            form = way.capture_at(request, general)
        return _captured(request, WidenedForm(way, general, form), example=general.tensors)

    return Beyond(_shapes(general), capture_there)


def capture_export(
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
    settlement = settled("the exported program", program, guards, None, example)
    program = fold_constant_sizes(settlement.bounded(program))
    program = replace(program, graph=with_asserted(program.graph, program.weights))
    always = fixed_notes(program, len(names))
    return Captured(program, eager, example, structure, (*always, *settlement.notes))


def capture_graph(
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

    return Captured(
        model.program, eager, example, model.structure, is_graph=True, signature=model.signature
    )


def _tensors(tree: Any) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
