"""A plan: the degrees, exchange and placement of every layer, and their predicted cost; its text
and its file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.printable import columns, preformatted
from moec.files.regular_file import read_regular, whole_file
from moec.plan.inputs.files import Natural, Positive, Record, Source
from moec.plan.inputs.workload import Workload
from moec.plan.network.exchange import Form

Expert = Annotated[int, msgspec.Meta(ge=0)]

_HEAD = (
    "layers", "attention", "experts", "exchange", "slots", "busiest/mean", "bound",
    "exchange ms", "experts ms", "layer ms",
)  # fmt: skip

_OVERLAP = {
    False: "shared experts run while rows travel",
    True: "rows of one micro-batch travel during the products of the other",
}


class Number(Record, frozen=True, kw_only=True):
    """A number on which the plan is based."""

    name: str
    value: float
    source: Source
    note: str = ""


class Sends(Record, frozen=True, kw_only=True):
    """The other nodes and ranks to which a row goes on average if it is sent once to each, counted
    on a trace; `by_load`, the same with experts placed by their loads alone."""

    nodes: float
    ranks: float
    nodes_by_load: float
    ranks_by_load: float


class LayerPlan(Record, frozen=True, kw_only=True):
    """The plan of one layer.

    `attention` ranks share attention and dense products. `ranks` (EP) share the experts, each cut
    into `slices`, in `copies` groups; `slots[r]` are the experts of rank r of a group. `groups` has
    the first and the last rank of each group of experts, such as a modality. Predicted:
    `seconds` by part, of which `hidden` overlap with others; `memory` in bytes a rank; `imbalance`,
    the busiest rank's load over the mean, and `bound`, its lower bound.
    """

    layer: Natural
    experts: Natural
    attention: Positive
    ranks: Positive = 1
    slices: Positive = 1
    copies: Positive = 1
    form: Form = "flat"
    slots: tuple[tuple[Expert, ...], ...] = ()
    groups: dict[str, tuple[Natural, Natural]] = msgspec.field(default_factory=dict)
    sends: Sends | None = None
    imbalance: float = 1.0
    bound: float = 1.0
    seconds: dict[str, float]
    hidden: float = 0.0
    memory: float = 0.0

    def __post_init__(self) -> None:
        if not self.experts:
            return
        if len(self.slots) != self.ranks:
            raise ValueError(f"layer {self.layer}: {len(self.slots)} of {self.ranks} ranks")
        held = {expert for slots in self.slots for expert in slots}
        if held != set(range(self.experts)):
            raise ValueError(f"layer {self.layer}: the ranks do not hold experts 0..E-1")

    @property
    def total(self) -> float:
        return sum(self.seconds.values()) - self.hidden


class Plan(Record, frozen=True, kw_only=True):
    version: Literal[1] = 1
    model: str
    cluster: str
    devices: Positive
    node_size: Positive
    workload: Workload
    routing: str
    layers: tuple[LayerPlan, ...]
    seconds: float
    memory: float
    memory_limit: float
    numbers: tuple[Number, ...] = ()

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer.experts and layer.ranks * layer.slices * layer.copies != self.devices:
                raise ValueError(
                    f"layer {layer.layer}: {layer.ranks} ranks x {layer.slices} slices x "
                    f"{layer.copies} copies are not {self.devices} devices"
                )
            if self.devices % layer.attention:
                raise ValueError(f"layer {layer.layer}: attention of {layer.attention} ranks")

    def _repr_html_(self) -> str:
        return preformatted(show(self))


def show(plan: Plan) -> str:
    """The plan as a table, with the numbers on which it is based."""
    per_step = plan.workload.tokens / plan.seconds if plan.seconds else 0.0
    lines = [
        f"{plan.model} on {plan.cluster}: {plan.devices} devices",
        f"{plan.workload.phase}: {plan.workload.tokens} tokens a step, "
        f"{plan.workload.sequences} sequences of {plan.workload.context} tokens; "
        f"routing: {plan.routing}",
        "",
        *columns([_HEAD, *(layer_row(group) for group in _groups(plan.layers))]),
        "",
        f"step {plan.seconds * 1e3:.2f} ms, {per_step:,.0f} tokens/s; "
        f"{plan.memory / 1e9:.1f} of {plan.memory_limit / 1e9:.1f} GB a device (predicted)",
        *_latency(plan),
        *_sends(plan),
        *_bound(plan.layers),
        "",
        "Numbers used:",
        *columns([(n.name, f"{n.value:.4g}", n.source, n.note) for n in plan.numbers]),
        f"All times are predicted from these; {_OVERLAP[plan.workload.overlap]} (assumed).",
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _latency(plan: Plan) -> list[str]:
    target = plan.workload.latency
    if target is None:
        return []
    word = "within" if plan.seconds <= target.value else "BEYOND"
    return [f"{word} the target of {target.value * 1e3:.2f} ms a step"]


def _sends(plan: Plan) -> list[str]:
    """To how many nodes and ranks a row goes, if the plan is of a trace."""
    sends = [layer.sends for layer in plan.layers if layer.sends]
    if not sends:
        return []
    nodes, nodes_by_load = _mean(s.nodes for s in sends), _mean(s.nodes_by_load for s in sends)
    ranks, ranks_by_load = _mean(s.ranks for s in sends), _mean(s.ranks_by_load for s in sends)
    targets = f"{ranks:.2f} other ranks ({ranks_by_load:.2f})"
    if plan.devices > plan.node_size:
        targets = f"{nodes:.2f} other nodes ({nodes_by_load:.2f}) and {targets}"
    return [
        f"sent once to each, a row goes to {targets}; in brackets with experts placed by load",
        "alone (counted on the trace, mean of the layers)",
    ]


def _bound(layers: Sequence[LayerPlan]) -> list[str]:
    """The ranks of each group of experts."""
    bound: dict[str, list[int]] = {}
    for layer in layers:
        parts = [
            f"{name} rank{'s' if last > first else ''} {_ranges(range(first, last + 1))}"
            for name, (first, last) in layer.groups.items()
        ]
        if parts:
            bound.setdefault(", ".join(parts), []).append(layer.layer)
    return [f"experts of layers {_ranges(numbers)}: {parts}" for parts, numbers in bound.items()]


def _groups(layers: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers of equal degrees, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(degrees_of(layer), []).append(layer)
    return list(groups.values())


def _ranges(numbers: Sequence[int]) -> str:
    """ "3-5,9" for 3, 4, 5 and 9; long lists end in how many more there are."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        values = [number for _, number in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    if len(parts) <= 4:
        return ",".join(parts)
    return f"{len(numbers)} layers: {','.join(parts[:3])}…"


def degrees_of(layer: LayerPlan) -> tuple[object, ...]:
    slots = sum(map(len, layer.slots))
    return (
        layer.experts, layer.attention, layer.ranks, layer.slices, layer.copies, layer.form, slots
    )  # fmt: skip


def layer_row(group: Sequence[LayerPlan]) -> tuple[str, ...]:
    one = group[0]
    name = _ranges([layer.layer for layer in group])
    total = f"{_mean(layer.total for layer in group) * 1e3:.3f}"
    if not one.experts:
        return (name, f"TP {one.attention}", "dense", *["-"] * 6, total)
    experts = f"EP {one.ranks}"
    experts += f" x slice {one.slices}" if one.slices > 1 else ""
    experts += f" x DP {one.copies}" if one.copies > 1 else ""
    parts = ("exchange out", "exchange back")
    moved = _mean(sum(layer.seconds.get(part, 0.0) for part in parts) for layer in group)
    return (
        name,
        f"TP {one.attention}",
        experts,
        one.form,
        f"{sum(map(len, one.slots))} of {one.experts}",
        f"{max(layer.imbalance for layer in group):.3f}",
        f"{max(layer.bound for layer in group):.3f}",
        f"{moved * 1e3:.3f}",
        f"{_mean(layer.seconds.get('experts', 0.0) for layer in group) * 1e3:.3f}",
        total,
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def write_plan(plan: Plan, path: Path) -> None:
    """Write the plan as JSON. A failure leaves no partial file."""
    text = msgspec.json.format(msgspec.json.encode(plan), indent=1)
    with whole_file(path) as file:
        file.write(text + b"\n")


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises UsageError with what in the file is not a plan."""
    try:
        return msgspec.json.decode(read_regular(path), type=Plan)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is not a plan: {error}") from None
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {reason(error)}") from None


def physical_to_logical(plan: Plan) -> NDArray[np.int64]:
    """The placement in the form of vLLM and SGLang: [L, P], slot q on rank q // (P / ranks).

    Raises UsageError where layers, or ranks of a layer, have different numbers of slots, which
    those engines do not support.
    """
    rows = []
    for layer in plan.layers:
        if not layer.experts:
            continue
        widths = {len(slots) for slots in layer.slots}
        if len(widths) > 1:
            raise UsageError(
                f"layer {layer.layer} has ranks with {min(widths)} and {max(widths)} slots; vLLM "
                "and SGLang need equal numbers: plan with --spare that divides by the ranks"
            )
        rows.append([expert for slots in layer.slots for expert in slots])
    if not rows:
        raise UsageError("the plan has no MoE layer")
    if len({len(row) for row in rows}) > 1:
        raise UsageError(
            "layers have different numbers of slots; vLLM and SGLang need equal numbers"
        )
    return np.array(rows, np.int64)
