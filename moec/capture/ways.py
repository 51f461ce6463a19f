"""The ways to capture a module at given lengths, each one more general and slower than the last.

    traced       torch.export alone
    speculated   branches on data are answered, and the answers are proved; the rows of an expert
                 are those of its class, or pieces of sorted rows (`IN_PIECES`)
    masked       as speculated, and every row is computed for every expert

A way is used at the lengths of the widened example first, and again at others where a size decides
a branch (`moec.capture.sizes.sides`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.export import ExportedProgram

from moec.capture.calls.call import FlatCall
from moec.capture.calls.states import detached
from moec.capture.captured import WayName
from moec.capture.decomposition import decompose
from moec.capture.export.module_export import (
    convert,
    export_call,
    export_module,
    from_start,
    symbol_names,
)
from moec.capture.request import CaptureRequest
from moec.capture.sizes.fixed_axes import causes
from moec.capture.sizes.guards import CaptureForm, ConvertedExport, guards_of
from moec.capture.sizes.widen import Widened
from moec.capture.speculate import SpeculatedForm, masked, refuse_random, speculate
from moec.errors import CaptureError
from moec.ir.interpret.outputs import Structure

Example = tuple[torch.Tensor, ...]
"""The tensors of a call on which a form is proved, beside those at whose lengths it is exported."""


@dataclass(frozen=True)
class CaptureWay:
    """A way to capture: `name` is shown to users, and `capture_at` captures the module of a request
    at lengths. `capture_at` raises CaptureError where the module cannot be captured so."""

    name: WayName
    capture_at: Callable[[CaptureRequest, Widened], CaptureForm]


def remembering(way: CaptureWay) -> CaptureWay:
    """The way with its answers remembered: many guards have their other sides at equal lengths."""
    answers: dict[str, CaptureForm | CaptureError] = {}

    def capture_at(request: CaptureRequest, general: Widened) -> CaptureForm:
        lengths = str((general.groups, [tensor.shape for tensor in general.tensors]))
        if lengths not in answers:
            try:
                answers[lengths] = way.capture_at(request, general)
            except CaptureError as error:
                answers[lengths] = error
        answer = answers[lengths]
        if isinstance(answer, CaptureError):
            raise answer
        return answer

    return CaptureWay(way.name, capture_at)


@dataclass(frozen=True)
class WidenedForm:
    """What a way captured at the lengths of a widened example."""

    way: CaptureWay
    general: Widened
    form: CaptureForm


def traced_form(request: CaptureRequest, general: Widened) -> CaptureForm:
    """The module as torch.export captures it."""
    flat = FlatCall(request.call)
    exported = export_call(flat, general)
    refuse_random(request.module_name, exported)
    structure = flat.structure
    return CaptureForm(_converted(request, general, exported, structure), structure)


def speculated_form(
    request: CaptureRequest, general: Widened, *examples: Example, by_class: bool = True
) -> SpeculatedForm:
    """The module with branches on data answered, proved at the lengths of `general` and of
    `examples`, and the trace that it comes from."""
    export, convert = partial(export_module, general), partial(_converted, request, general)
    tensors = (general.tensors, *examples)
    return speculate(request.call, export, convert, tensors, by_class)


def masked_form(
    request: CaptureRequest, general: Widened, rows: SpeculatedForm, *examples: Example
) -> CaptureForm:
    """A speculation with every row computed for every expert, proved as `speculated_form` is."""
    export, convert = partial(export_module, general), partial(_converted, request, general)
    decomposed = decompose(rows.traced.exported)
    return masked(decomposed, rows, export, convert, (general.tensors, *examples))


def _by_class(request: CaptureRequest, general: Widened) -> CaptureForm:
    return speculated_form(request, general).form


def _in_pieces(request: CaptureRequest, general: Widened) -> CaptureForm:
    return speculated_form(request, general, by_class=False).form


def _with_masks(request: CaptureRequest, general: Widened) -> CaptureForm:
    return masked_form(request, general, speculated_form(request, general))


TRACED = CaptureWay("traced", traced_form)
BY_CLASS = CaptureWay("speculated", _by_class)
IN_PIECES = CaptureWay("speculated", _in_pieces)
MASKED = CaptureWay("masked", _with_masks)


def _converted(
    request: CaptureRequest, general: Widened, exported: ExportedProgram, structure: Structure
) -> ConvertedExport:
    """The program of an export. Reads the guards first, because decomposition adds more."""
    rename = symbol_names(exported, general.wishes, general.groups)
    guards = guards_of(exported, rename)
    fixings = causes(exported)
    program = convert(
        exported, request.names, general.wishes, request.bounds, structure.names, general.groups
    )
    program, states = detached(program)
    eager = from_start(states, request.call, structure)
    return ConvertedExport(program, eager, guards, fixings)
