"""`moec.explore`: a page to look inside a model or an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from moec.errors import UsageError
from moec.exploration.explored_model import ExploredModel, of_artifact, of_compiled
from moec.exploration.kernels import kernel_rows, read_profile
from moec.exploration.page import page
from moec.exploration.plan import read_layers
from moec.exploration.routing import read_routing
from moec.model.compiled import CompiledModel
from moec.model.load import LoadedModel
from moec.plan.plan import Plan
from moec.profile.profile import ModelProfile
from moec.report.pass_graphs.declined import declined_row
from moec.report.pass_graphs.table import GraphTable, ports
from moec.runtime.call.routing_trace import RoutingTrace
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
