"""A plan of many devices as data of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from moec.errors import InputError
from moec.exploration.explored_model import ExploredModel
from moec.plan.plan import Plan, read_plan


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
