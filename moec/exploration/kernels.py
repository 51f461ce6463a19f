"""The calls of kernels, and their times from a profile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from moec.errors import InputError, UsageError
from moec.exploration.explored_model import ExploredModel
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular
from moec.profile.data import PhaseProfile, ProfileData
from moec.profile.profile import ModelProfile


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
    return {
        "name": phase.name,
        "function": phase.function,
        "sizes": dict(phase.sizes),
        "call": phase.call.seconds,
        "between": phase.between.seconds,
        "outside": phase.outside.seconds,
        "kernels": kernels,
    }
