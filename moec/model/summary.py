"""The report of a compiled model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from moec.errors import InputError
from moec.ir.graph import Graph
from moec.ir.sizes.dims import Bounds, show_dim
from moec.model.compilation import Compilation
from moec.passes.core.runner import Kind
from moec.pipeline import without_effect
from moec.report.data import DeclinedLine, ErrorLine, LoopLine
from moec.report.quantisation import unquantised_lines
from moec.report.report import Report, describe_graph, pass_lines
from moec.report.units import size
from moec.runtime.call.caches import bytes_of_caches
from moec.runtime.package import DECODE, Package, carries, side
from moec.runtime.text.causal_lm import causal_lm
from moec.target.named import missing_features
from moec.verify.check import Checked


def report_of(compiled: Compilation) -> Report:
    """What was recognised, declined, generated and measured."""
    package, checked = compiled.package, compiled.checked
    damage = tuple(result.damage for result in compiled.pass_results if result.damage)
    changed = (result.program for result in reversed(compiled.pass_results) if result.damage)
    program = next(changed, compiled.captured.program)
    described = describe_graph(program.graph, program.weights)
    others = [form.captured.program.graph for form in compiled.sides]
    limits = joined_bounds(program.graph, others)
    described["sizes"] = {name: (each.low, each.high) for name, each in limits.items()}
    idle = sum(block.parameters - block.active_parameters for block in compiled.blocks)
    return Report(
        model=compiled.source.name,
        target=compiled.target_name,
        active_parameters=described["parameters"] - idle,
        bytes_out=sum(a.nbytes for a in package.arrays.values()) if package else None,
        blocks=compiled.blocks,
        declined=tuple(DeclinedLine(d.where, d.reason, d.rule) for d in compiled.declined),
        passes=pass_lines(compiled.pass_results),
        kernels=dict(Counter(kernel for _, kernel in package.kernels)) if package else {},
        loops=tuple(LoopLine(*line) for line in package.refusals) if package else (),
        verification=_errors(checked) if checked else (),
        verified=_way(checked),
        checked_kernels="\n".join(checked.questions) if checked else "",
        text=cost_of_text(package) if package else "",
        quantised=compiled.quantised,
        moved=checked.moved if checked else (),
        phases=dict(compiled.phases),
        notes=_notes(compiled),
        damage=damage,
        choices=tuple(line for result in compiled.pass_results for line in result.choices),
        **described,
    )


def cost_of_text(package: Package) -> str:
    """What a text takes: its caches, or that there is none, and why. Empty for a model that writes
    no text, or has its cache within."""
    try:
        if causal_lm(package.main).cached:
            return ""
    except InputError:
        return ""
    if package.generation is None:
        return f"each new token takes the whole text again: {package.no_generation}"
    decode = package.functions[DECODE]
    states, token = (bytes_of_caches(decode.caches, 1, room) for room in (0, 1))
    state = f", and {size(states)} of state" if states else ""
    guesses = ", which cannot go back: nothing is guessed" if carries(decode) else ""
    return f"the cache takes {size(token - states)} a token{state}{guesses}; texts run side by side"


def _way(checked: Checked | None) -> str:
    if checked is None:
        return "off"
    return "quick" if not checked.errors else "layers" if checked.layers else "whole"


def _errors(checked: Checked) -> tuple[ErrorLine, ...]:
    """The greatest error of each output."""
    errors = checked.errors.items()
    return tuple(ErrorLine(name, error, checked.tolerance) for name, error in errors)


def _notes(compiled: Compilation) -> tuple[str, ...]:
    captured, package, for_gpu = compiled.captured, compiled.package, compiled.for_gpu
    messages = (
        f"{result.name}: {line}" for result in compiled.pass_results for line in result.says
    )
    notes = (*captured.fixed, *captured.notes, *messages, *captured.structure.constants)
    if captured.signature and not compiled.source.unnamed:
        notes += captured.signature.notes
    notes += (compiled.source.memory.note,) if compiled.source.memory.note else ()
    if compiled.sides:
        names = ", ".join(side(number) for number, _ in enumerate(compiled.sides, 1))
        notes += (f"beyond these bounds the other sides of branches are compiled too: {names}",)
    if package:
        notes += package.notes
    if package and missing_features(compiled.target):
        notes += (
            f"compiled for {compiled.target.name}, which this machine cannot run: the code was not "
            "verified, and is saved without samples",
        )
    if for_gpu is not None:
        notes += (f"code for {for_gpu.target_name} is included, and was not verified",)
        notes += tuple(f"on a GPU {r[1]} of {r[0]}: {r[2]}" for r in for_gpu.refusals)
    notes += (*unquantised_lines(compiled.pass_results), *without_effect(compiled.pass_results))
    return notes + (_verification_notes(compiled, compiled.checked) if compiled.checked else ())


def _verification_notes(compiled: Compilation, checked: Checked) -> tuple[str, ...]:
    """What the errors of the report were measured against, and rows that they leave out."""
    notes = checked.notes
    if checked.layers:
        notes += ("eager ran layer by layer for all inputs of the comparison (--verify layers)",)
    if any(r.kind is Kind.CHANGES and r.rewrites for r in compiled.pass_results):
        damaged = any(result.damage for result in compiled.pass_results)
        above = "; the distance to the original model is listed above" if damaged else ""
        notes += (
            "the compiled code was compared with the graph that the passes changed; the "
            f"graph before these passes was compared with eager{above}",
        )
    return notes


def joined_bounds(main: Graph, others: Sequence[Graph]) -> Mapping[str, Bounds]:
    """The bounds of `main`, extended by those of the others that differ in one size, and go on
    where these end."""
    joined = dict(main.bounds)
    for other in (*others, *reversed(others)):  # in whatever order they touch
        bounds = joined | _bounds_by_axis(main, other)
        differing = [name for name in joined if bounds[name] != joined[name]]
        differing += [name for name in bounds.keys() - joined if not name.isidentifier()]
        if len(differing) == 1:
            (name,) = differing
            first, second = sorted((bounds[name], joined[name]), key=lambda limits: limits.low)
            if first.high is None or first.high + 1 >= second.low:
                highs = (first.high, second.high)
                high = None if None in highs else max(h for h in highs if h is not None)
                joined[name] = Bounds(first.low, high, joined[name].line)
    return joined


def _bounds_by_axis(main: Graph, other: Graph) -> dict[str, Bounds]:
    """The bounds of another graph, by the names that `main` has for the sizes of inputs."""
    bounds = {}
    for value, twin in zip(main.inputs, other.inputs, strict=True):
        for dim, there in zip(value.shape, twin.shape, strict=True):
            exactly = Bounds(there, there) if isinstance(there, int) else Bounds()
            if not isinstance(dim, int):
                bounds[show_dim(dim)] = other.bounds.get(show_dim(there), exactly)
    return {**other.bounds, **bounds}
