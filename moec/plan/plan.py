"""A plan: the degrees, exchange and placement of every layer, and their predicted cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError
from moec.files.whole_file import whole_file
from moec.plan.inputs.files import Natural, Positive, Record, Source
from moec.plan.inputs.workload import Workload
from moec.plan.network.exchange import Form

Expert = Annotated[int, msgspec.Meta(ge=0)]


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


def write_plan(plan: Plan, path: Path) -> None:
    """Write the plan as JSON. A failure leaves no partial file."""
    text = msgspec.json.format(msgspec.json.encode(plan), indent=1)
    with whole_file(path) as file:
        file.write(text + b"\n")


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises UsageError with what in the file is not a plan."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Plan)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a plan: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None


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
