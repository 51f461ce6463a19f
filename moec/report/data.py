"""The data of a report, which `--json` prints and an artifact stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import msgspec

from moec.errors import ArtifactError
from moec.passes.core.damage import ChoiceLine, Damage

WHOLE = "(whole model)"
"""The name of a block without a module."""


@dataclass(frozen=True)
class Block:
    """One block. `parameters` counts those of its experts, `active_parameters` those of the top k.

    `router` and `activation` are phrases, such as "softmax, top-2, renormalised" and "swiglu",
    or "custom"; `form` is how the source wrote the experts. `shared` describes a dense branch that
    is added to the block's result ("" without one); `kernel` names the kernels of the block (""
    until code is generated). `experts` counts the experts with a network, `zero` those without one
    ("2 constant, 1 copy, 1 zero").
    """

    name: str
    experts: int
    top_k: int
    router: str
    activation: str
    form: str
    parameters: int
    active_parameters: int
    shared: str = ""
    kernel: str = ""
    zero: str = ""


@dataclass(frozen=True)
class DeclinedLine:
    where: str
    reason: str
    rule: str


@dataclass(frozen=True)
class PassLine:
    name: str
    stage: str
    rewrites: int
    ops: int
    seconds: float


@dataclass(frozen=True)
class PortLine:
    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class ErrorLine:
    """The error of one output against eager: the greatest error relative to the greatest value."""

    output: str
    error: float
    tolerance: float


@dataclass(frozen=True)
class QuantisedLine:
    """The quantised experts of one module, or linear layers of one name. `covered` of the `parts`
    were quantised. Errors are those of the weights, relative to their norm: `error` over all parts,
    `worst` of the worst part.

    With calibration data, `fewest` is the least number of rows of a part, and `few` are the parts
    that had too few rows and were rounded to nearest; `nearest` and `solved` are the errors of the
    products on these data, with all codes rounded to nearest and with the codes in use.
    """

    name: str
    format: str
    parts: int
    covered: int
    bytes_before: int
    bytes_after: int
    error: float
    worst: float
    fewest: int | None = None
    few: tuple[int, ...] = ()
    nearest: float | None = None
    solved: float | None = None


@dataclass(frozen=True)
class MovedLine:
    """The error of an output of the quantised model against the unquantised one, over the cases of
    the verification: the difference relative to the norm, and the number of rows (tokens) with
    another argmax."""

    output: str
    error: float
    moved: int
    rows: int


@dataclass(frozen=True)
class LoopLine:
    """An op that became a plain loop although its kind has kernels, and the reason."""

    where: str
    op: str
    reason: str


@dataclass(frozen=True)
class ReportData:
    """All facts about a compilation. `bytes_out` is None where no weights were packed. `verified`
    is how the code was compared with eager: "off", "quick", "layers" or "whole";
    `checked_kernels` has a line for each question that was asked. `text` says what continuing a
    text costs; empty for other models."""

    model: str
    target: str = ""
    parameters: int = 0
    active_parameters: int = 0
    bytes_by_dtype: Mapping[str, int] = field(default_factory=dict)
    bytes_out: int | None = None
    inputs: tuple[PortLine, ...] = ()
    outputs: tuple[PortLine, ...] = ()
    states: tuple[PortLine, ...] = ()
    sizes: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    declined: tuple[DeclinedLine, ...] = ()
    passes: tuple[PassLine, ...] = ()
    kernels: Mapping[str, int] = field(default_factory=dict)
    loops: tuple[LoopLine, ...] = ()
    verification: tuple[ErrorLine, ...] = ()
    verified: str = "off"
    checked_kernels: str = ""
    text: str = ""
    quantised: tuple[QuantisedLine, ...] = ()
    moved: tuple[MovedLine, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    damage: tuple[Damage, ...] = ()
    choices: tuple[ChoiceLine, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible dicts, lists and numbers."""
        return asdict(self)

    @classmethod
    def of_dict(cls, recorded: Mapping[str, Any]) -> Self:
        """Parse the output of `to_dict`, ignoring unknown fields.

        Raises ArtifactError where it is malformed: it may come from an untrusted artifact.
        """
        try:
            return msgspec.convert(recorded, cls)
        except msgspec.ValidationError as error:
            raise ArtifactError(
                f"the report is malformed: {error}; compile the model again"
            ) from error
