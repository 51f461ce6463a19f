"""Programs beside `main`: text generation, hoisted routers, and recording of routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moec.codegen.lower import supported
from moec.errors import NoMatch, SetupError
from moec.ir.graph import Stage
from moec.model.compiled import CompiledModel
from moec.passes.core.runner import Declined, Pass, run
from moec.passes.decode import continues_text, incremental
from moec.passes.decode.hidden_states import without_head
from moec.passes.specialise.hoist_routers import split
from moec.passes.specialise.record_routing import recorded_layers, with_choices
from moec.runtime.package import (
    DECODE,
    HIDDEN,
    RECORDED,
    RECORDED_DECODE,
    ROUTE,
    ROUTED,
    RecordedLayer,
    RouterPorts,
    route_part,
)

if TYPE_CHECKING:
    from moec.codegen.backend import Backend


def with_decode(compiled: CompiledModel, passes: Sequence[Pass], backend: Backend) -> CompiledModel:
    """The model with a program that continues texts, after its passes, or the reason why not."""
    program = compiled.module.main
    if not continues_text(program.graph):
        return compiled
    try:
        pass_results = run(incremental(program), passes, stage=Stage.GROUPED)
        if not supported(pass_results[-1].program.graph, backend):
            raise NoMatch(
                f"the kernels for {compiled.target.name} have no cache of keys and values"
            )
    except NoMatch as why:
        declined = Declined("text generation", str(why), "decode")
        return replace(compiled, declined=(*compiled.declined, declined), no_decode=str(why))
    more = (declined for pass_result in pass_results for declined in pass_result.declined)
    return replace(
        compiled,
        programs={**compiled.programs, DECODE: pass_results[-1].program},
        declined=(*compiled.declined, *more),
    )


def with_routers(compiled: CompiledModel) -> CompiledModel:
    """The model with the hoisted routers as one program, and the rest as another."""
    hoisted = split(compiled.module.main)
    if hoisted is None:
        return compiled
    layers = tuple(
        RouterPorts(c.layer, c.experts.name, c.weights.name if c.weights else "")
        for c in hoisted.choices
    )
    parts = {route_part(number): part for number, part in enumerate(hoisted.parts, 1)}
    programs = {**compiled.programs, ROUTE: hoisted.route, **parts, ROUTED: hoisted.routed}
    return replace(compiled, programs=programs, router_ports=layers)


def with_hidden_states(compiled: CompiledModel) -> CompiledModel:
    """The model with a program for its embeddings. Raises UsageError where it has no head."""
    try:
        hidden = without_head(compiled.module.main)
    except NoMatch as why:
        raise SetupError(f"{compiled.source.name} gives no embeddings: {why}") from None
    return replace(compiled, programs={**compiled.programs, HIDDEN: hidden})


def with_recording(compiled: CompiledModel) -> CompiledModel:
    """The model with second versions of `main` and `decode` that also return the choices of
    experts. Raises UsageError where no layer routes, or where routing is not by one row per
    token."""
    programs = dict(compiled.programs)
    try:
        programs[RECORDED] = with_choices(compiled.module.main)
        if DECODE in programs:
            tokens, _, rows, *_ = programs[DECODE].graph.inputs
            counts = [value.shape[0] * value.shape[1] for value in (tokens, rows)]
            programs[RECORDED_DECODE] = with_choices(programs[DECODE], counts)
    except NoMatch as why:
        raise SetupError(
            f"the routing of {compiled.source.name} cannot be recorded: {why}"
        ) from None
    layers = tuple(
        RecordedLayer(layer.layer, layer.experts)
        for layer in recorded_layers(compiled.module.main.graph)
    )
    return replace(compiled, programs=programs, recorded=layers)
