"""`moec.explore`: a page to look inside a model or an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moec.errors import UsageError
from moec.exploration.declined import declined_rows
from moec.exploration.graphs import GraphTable
from moec.exploration.kernels import kernel_rows, read_profile
from moec.exploration.page import page
from moec.exploration.plan import read_layers
from moec.exploration.routing import read_routing
from moec.exploration.subject import Subject, of_artifact, of_compiled
from moec.model.compiled import CompiledModel
from moec.model.load import LoadedModel
from moec.plan.plan import Plan
from moec.profile.profile import ModelProfile
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

    It has the graph after each pass and what the pass changed (of an artifact, the last graph of
    each function), the user's line of each op, blocks that were recognised and declined with the
    reasons, kernels and weights. `trace` is a recorded routing, `profile` the times of kernels, as
    objects or the files of `moec run --record-routing` and `moec profile --json`; `plan` is a plan
    of `moec plan`.

    Raises ArtifactError where the path is no artifact, or a damaged one, InputError where the trace
    or the profile is of another model, and UsageError where it, or the plan, cannot be read.
    """
    return page(page_data(subject_of(model), trace=trace, profile=profile, plan=plan))


def page_data(
    subject: Subject,
    *,
    trace: RoutingTrace | Path | str | None = None,
    profile: ModelProfile | Path | str | None = None,
    plan: Plan | Path | str | None = None,
) -> dict[str, Any]:
    """What the page shows, as data; raises as `explore`."""
    # What cannot be read is refused before the graphs are compared.
    routing = None if trace is None else read_routing(trace, subject.routers(), subject.name)
    times = None if profile is None else read_profile(profile, subject)
    layers = None if plan is None else read_layers(plan, subject)
    table = GraphTable()
    functions = [
        {"name": name, "steps": table.steps(steps), **table.ports(steps[-1].graph)}
        for name, steps in subject.functions.items()
    ]
    report = subject.report
    return {
        "title": subject.name,
        "artifact": subject.artifact,
        "report": report.to_dict(),
        "functions": functions,
        "texts": list(table.texts),
        "ops": list(table.ops),
        "declined": declined_rows(report.declined, subject.functions[MAIN]),
        "calls": kernel_rows(subject),
        "weights": [asdict(weight) for weight in subject.weights],
        "profile": times,
        "routing": routing,
        "plan": layers,
    }


def subject_of(model: CompiledModel | LoadedModel | Path | str) -> Subject:
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
