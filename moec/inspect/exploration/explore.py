"""`moec.explore`: a page to look inside a model or an artifact."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moec.errors import InputError, UsageError
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular
from moec.inspect.exploration.explored_model import ExploredModel, of_artifact, of_compiled
from moec.inspect.exploration.page import page
from moec.model.compiled import CompiledModel
from moec.model.load import LoadedModel
from moec.plan.plan import Plan, read_plan
from moec.report.pass_graphs.stored import declined_row
from moec.report.pass_graphs.table import GraphTable, ports
from moec.report.profile.data import PhaseProfile, ProfileData
from moec.report.profile.profile import ModelProfile
from moec.report.units import counted
from moec.runtime.call.routing_trace import RoutingTrace, load_trace
from moec.runtime.package import MAIN


def explore(
    model: CompiledModel | LoadedModel | Path | str,
    *,
    trace: RoutingTrace | Path | str | None = None,
    profile: ModelProfile | Path | str | None = None,
    plan: Plan | Path | str | None = None,
) -> str:
    """One HTML page, which needs nothing else, to see inside a compiled model or an artifact.

    It has the graph after each pass and what the pass changed (of an artifact that was saved
    without `keep_passes`, the last graph of each function), the user's line of each op, blocks that
    were recognised and declined with the reasons, kernels and weights. `trace` is a recorded
    routing, `profile` the times of kernels, as objects or the files of `moec run --record-routing`
    and `moec profile --json`; `plan` is a plan of `moec plan`.

    Raises ArtifactError where the path is no artifact, or a damaged one, InputError where the trace
    or the profile is of another model, and UsageError where it, or the plan, cannot be read.
    """
    return page(page_data(explored_model(model), trace=trace, profile=profile, plan=plan))


def page_data(
    model: ExploredModel,
    *,
    trace: RoutingTrace | Path | str | None = None,
    profile: ModelProfile | Path | str | None = None,
    plan: Plan | Path | str | None = None,
) -> dict[str, Any]:
    """What the page shows, as data; raises as `explore`."""
    # What cannot be read is refused before the graphs are compared.
    routing = None if trace is None else read_routing(trace, model.routers(), model.name)
    times = None if profile is None else read_profile(profile, model)
    layers = None if plan is None else read_layers(plan, model)
    stored, report = model.passes, model.report
    table = stored.table() if stored else GraphTable()
    functions = [
        {
            "name": name,
            "steps": stored.steps if stored and name == MAIN else table.steps(steps),
            **ports(steps[-1].graph),
        }
        for name, steps in model.functions.items()
    ]
    steps = model.functions[MAIN]
    declined = stored.declined if stored else [declined_row(d, steps) for d in report.declined]
    return {
        "title": model.name,
        "artifact": model.artifact,
        "report": report.to_dict(),
        "functions": msgspec.to_builtins(functions),
        "texts": list(table.texts),
        "ops": list(table.ops),
        "declined": msgspec.to_builtins(declined),
        "calls": kernel_rows(model),
        "weights": [asdict(weight) for weight in model.weights],
        "profile": times,
        "routing": routing,
        "plan": layers,
    }


def explored_model(model: CompiledModel | LoadedModel | Path | str) -> ExploredModel:
    """Raises ArtifactError where a path is no artifact, UsageError for anything else."""
    match model:
        case CompiledModel():
            return of_compiled(model)
        case LoadedModel():
            return of_artifact(model.path)
        case str() | Path():
            return of_artifact(Path(model))
    raise UsageError(
        f"{type(model).__name__} cannot be explored: give what moec.compile returns, or the path "
        "of an artifact"
    )


def read_layers(source: Plan | Path | str, model: ExploredModel) -> dict[str, Any]:
    """The plan with the predicted seconds of each layer. Raises UsageError where it cannot be read,
    and InputError where its MoE layers have other numbers of experts than the model's."""
    plan = source if isinstance(source, Plan) else read_plan(Path(source))
    name = "the plan" if isinstance(source, Plan) else str(source)
    planned = [layer.experts for layer in plan.layers if layer.experts]
    experts = [block.experts for block in model.report.blocks]
    if planned != experts:
        raise InputError(
            f"{name} is of another model ({plan.model}): its MoE layers have {planned} experts, "
            f"and those of {model.name} {experts}"
        )
    data: dict[str, Any] = msgspec.to_builtins(plan)
    for layer, row in zip(plan.layers, data["layers"], strict=True):
        row["total"] = layer.total
    return data


MOST = 1 << 20
"""The most ids on a page: 2.8 MB of text."""


def read_routing(
    source: RoutingTrace | Path | str, routers: Sequence[tuple[str, int]], model: str
) -> dict[str, Any]:
    """The first tokens of a trace: `ids` [T, L, K] and `phase` [T] in base64.

    Raises InputError where it is no trace, is empty, or was recorded of another model.
    """
    trace = source if isinstance(source, RoutingTrace) else load_trace(Path(source))
    name = "the trace" if isinstance(source, RoutingTrace) else str(source)
    if not (trace.ids >= 0).any():
        raise InputError(f"{name}: no expert was chosen: it has no routing to show")
    recorded = [int(experts) for experts in trace.experts]
    if recorded != [experts for _, experts in routers]:
        raise InputError(
            f"{name} was recorded of another model: it has {_layers(recorded)}, and {model} has "
            f"{_layers([experts for _, experts in routers])}"
        )
    tokens = min(trace.tokens, max(1, MOST // trace.ids[0].size))
    shown = trace.part(slice(0, tokens))
    return {
        "layers": [layer for layer, _ in routers],
        "experts": recorded,
        "tokens": tokens,
        "of": trace.tokens,
        "k": int(trace.ids.shape[2]),
        "ids": _base64(shown.ids.astype("<i2")),
        "phase": _base64(shown.phase.astype("u1")),
    }


def _layers(experts: Sequence[int]) -> str:
    """ "4 MoE layers of 8 experts"."""
    sizes = " and ".join(map(str, sorted(set(experts))))
    return counted(len(experts), "MoE layer") + (f" of {sizes} experts" if experts else "")


def _base64(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def kernel_rows(model: ExploredModel) -> list[dict[str, Any]]:
    """A row for each call of a kernel; `ops` are positions in the function's last graph."""
    rows = []
    for function, sites in model.calls.items():
        graph = model.functions[function][-1].graph
        position = {op.outputs[0].name: at for at, op in enumerate(graph.ops)}
        for number, site in enumerate(sites):
            ops = [position[name] for name in site.ops if name in position]
            row = {"function": function, "call": number, "ops": ops}
            rows.append(row | {"module": site.origin, "line": site.line})
    return rows


def read_profile(source: ModelProfile | Path | str, model: ExploredModel) -> dict[str, Any]:
    """The phases of a profile: time, and for each call of a kernel its name, time and work.

    Raises InputError where the file is no profile or one of another artifact, and UsageError where
    no code was generated.
    """
    if not model.calls:
        why = "it is a model" if not model.artifact else "it lists none, as older ones do"
        raise UsageError(
            f"a profile has times of an artifact's kernels, and {model.name} has none: {why}; "
            "compile it and explore the artifact"
        )
    data = source.data if isinstance(source, ModelProfile) else _read(Path(source))
    name = "the profile" if isinstance(source, ModelProfile) else str(source)
    for phase in data.phases:
        _check(phase, model, name)
    return {
        "machine": data.machine,
        "threads": data.threads,
        "phases": [_phase(phase) for phase in data.phases],
    }


def _read(path: Path) -> ProfileData:
    try:
        return msgspec.convert(json.loads(read_regular(path)), ProfileData)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, msgspec.ValidationError):
        raise InputError(
            f"{path} is not a profile: it is not what `moec profile --json` writes"
        ) from None


def _check(phase: PhaseProfile, model: ExploredModel, name: str) -> None:
    sites = [(site.origin, site.line) for site in model.calls.get(phase.function, ())]
    lines = [(line.module, line.line) for line in phase.kernels]
    if len(sites) != len(lines):
        raise InputError(
            f"{name} is a profile of another artifact: its {phase.function} runs {len(lines)} "
            f"kernels, and that of {model.name} has {len(sites)}"
        )
    for number, (line, site) in enumerate(zip(lines, sites, strict=True)):
        if line != site:
            raise InputError(
                f"{name} is a profile of another artifact: kernel {number} of its {phase.function} "
                f"is of {line[0] or 'no module'}, and that of {model.name} of "
                f"{site[0] or 'no module'}"
            )


def _phase(phase: PhaseProfile) -> Mapping[str, Any]:
    fields = ("kernel", "flops", "bytes", "least", "at_most")
    kernels = [
        {"time": asdict(line.time)} | {field: getattr(line, field) for field in fields}
        for line in phase.kernels
    ]
    names = {field: getattr(phase, field) for field in ("name", "function", "sizes")}
    times = {field: getattr(phase, field).seconds for field in ("call", "between", "outside")}
    return {**names, **times, "kernels": kernels}
