"""Capture by speculation: assume outcomes of branches, export, prove against eager, or refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.export import Dim, ExportedProgram

from moec.capture.calls.call import ModuleCall
from moec.capture.sizes.guards import CaptureForm, ConvertedExport
from moec.capture.speculate.masked import MaskedInterpreter
from moec.capture.speculate.proof import Verdict, examine
from moec.capture.speculate.refusals import (
    Untraceable,
    assumptions,
    differs,
    explained,
    unproved,
)
from moec.capture.speculate.trace import Assumed, Export, Traced, trace
from moec.capture.user_code.probe import SpeculationProbe
from moec.capture.user_code.sites import Site
from moec.errors import CaptureError
from moec.ir.graph import Program
from moec.ir.interpret.outputs import Structure
from moec.torch_private import TESTED, MissingTorchName, symbolic_config


@cache
def hooks_fit() -> bool:
    """Whether the probe module is captured correctly. Warns, once, where it is not."""
    misfit = describe_unknown_torch()
    if misfit:
        warnings.warn(misfit, stacklevel=2)
    return not misfit


def describe_unknown_torch() -> str:
    """One sentence for users about a torch with other private parts; empty where they fit."""
    reason = describe_misfit()
    return reason and (
        f"moec does not know torch {torch.__version__} ({reason}): modules that read data into "
        f"Python are captured only where torch.export takes them (tested: torch {TESTED})"
    )


def describe_misfit() -> str:
    """What went wrong; empty where nothing did."""
    x = torch.randn(5, 3)

    def export(module: torch.nn.Module) -> ExportedProgram:
        options = symbolic_config.patch(backed_size_oblivious=True, use_duck_shape=False)
        with torch.no_grad(), options, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                module, (x,), dynamic_shapes=(({0: Dim.AUTO},),), strict=False
            )

    try:
        traced = trace(ModuleCall(SpeculationProbe(), (x,), {}), export, {})
        met = list(traced.assumed.branches.values())
        results = traced.exported.module(check_guards=False)(x)
    except MissingTorchName as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} where a small module is traced"
    if met != [False]:
        return "a branch on data is not seen"
    return (
        ""
        if torch.equal(results[0], SpeculationProbe()(x))
        else "a small module gives something else"
    )


Convert = Callable[[ExportedProgram, Structure], ConvertedExport]
"""Converts an export, given the structure of the module's result."""
Examples = Sequence[Sequence[torch.Tensor]]

MOST_FLIPS = 8
"""How many branches are tried the other way, one at a time, before a capture is refused."""


@dataclass(frozen=True)
class SpeculatedForm:
    """A form whose assumptions are proved, and the trace that it comes from."""

    form: CaptureForm
    traced: Traced


@dataclass(frozen=True)
class _Attempt:
    form: CaptureForm
    traced: Traced
    verdict: Verdict


def speculate(
    call: ModuleCall,
    export: Export,
    convert: Convert,
    examples: Examples,
    by_class: bool = True,
) -> SpeculatedForm:
    """The program of `call`, with every assumption proved.

    Pieces of sorted rows are the rows of each class (`by_class`), which loops over experts need, or
    pieces of a split, which suit products one after another on rows that stay sorted.
    Branches on data are answered as they come out with many rows; where eager differs, single
    branches are answered the other way. Raises CaptureError where an assumption is not proved, and
    Untraceable where the hooks do not work with the installed torch.
    """
    name = type(call.module).__name__
    if not hooks_fit():
        raise Untraceable(f"{name} reads data into Python, and this torch is not known")

    def attempt(answers: Mapping[Site, bool]) -> _Attempt:
        with explained(name):
            traced = trace(call, export, answers, by_class=by_class)
            converted = convert(traced.exported, traced.structure)
        count, program, assumed = traced.structure.count, converted.program, traced.assumed
        verdict = examine(program, converted.eager, examples, assumed, count, converted.guards)
        converted = replace(converted, program=_cut(program, count))
        notes = assumptions(assumed, verdict)
        return _Attempt(CaptureForm(converted, traced.structure, notes), traced, verdict)

    first = attempt({})
    chosen = first
    if not first.verdict.agrees:
        met = first.traced.assumed.branches
        flipped = (attempt({site: not met[site]}) for site in list(met)[:MOST_FLIPS])
        chosen = next((other for other in flipped if other.verdict.agrees), first)
    if not chosen.verdict.agrees:
        raise first.verdict.varies or differs(name, first.traced.assumed, first.verdict)
    if chosen.verdict.unproved:
        raise CaptureError(unproved(name, chosen.traced.assumed, chosen.verdict))
    return SpeculatedForm(chosen.form, chosen.traced)


MASKED = (
    "rows that data choose have no kernel of their own here: every row is computed, and masked, "
    "which is the work of all experts"
)


def masked(
    decomposed: ExportedProgram,
    speculation: SpeculatedForm,
    export: Export,
    convert: Convert,
    examples: Examples,
) -> CaptureForm:
    """The masked form of a program that was captured and decomposed, proved in the same way.

    Raises CaptureError where masks cannot express what the program does with rows.
    """
    form, structure = speculation.form, speculation.form.structure
    with explained("the masked form"):
        exported = export(MaskedInterpreter(decomposed, structure.count))
        converted = convert(exported, structure)
    # The decomposed program has the example's side of each guard of its own export.
    guards = {guard.condition: guard for guard in (*form.converted.guards, *converted.guards)}
    fixings = {**converted.fixings, **form.converted.fixings}
    converted = replace(converted, guards=tuple(guards.values()), fixings=fixings)
    program, eager, count = converted.program, converted.eager, structure.count
    verdict = examine(program, eager, examples, Assumed(), count, converted.guards)
    if not verdict.agrees:
        raise verdict.varies or differs("the masked form", speculation.traced.assumed, verdict)
    return CaptureForm(converted, structure, (*form.notes, MASKED))


def _cut(program: Program, outputs: int) -> Program:
    """The program with its first `outputs` outputs, without ops that only the others need."""
    graph = program.graph
    results = graph.outputs[:outputs]
    needed = {*results, *(state.after for state in graph.states)}
    ops = []
    for op in reversed(graph.ops):
        if needed.isdisjoint(op.outputs) and not (op.name == "moec.size" and op.outputs):
            continue
        ops.append(op)
        needed.update(op.inputs)
    return replace(program, graph=replace(graph, outputs=results, ops=tuple(reversed(ops))))
