"""A recorded routing as data of a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import InputError
from moec.report.units import counted
from moec.runtime.call.routing_trace import RoutingTrace, load_trace

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
