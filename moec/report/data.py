"""What a compilation made, as data: what `--json` prints and an artifact keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import msgspec

from moec.errors import ArtifactError
from moec.passes.core.damage import Damage

WHOLE = "(whole model)"
"""The name of a block that is no module of its own."""


@dataclass(frozen=True)
class Block:
    """One block. `parameters` are those of its experts, `active_parameters` those of the top k.

    `router` and `activation` are phrases, such as "softmax, top-2, renormalised" and "swiglu",
    or "custom"; `form` is how the source wrote the experts. `shared` says how a dense branch is
    added to the block's result, and is empty where none is; `kernel` names what runs the block,
    and is empty until code is generated. `zero` counts the experts without a network that tokens
    may choose as well ("2 constant, 1 copy, 1 zero"); `experts` are those that have one.
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
    """How far one output is from eager's: the greatest error relative to the greatest value."""

    output: str
    error: float
    tolerance: float


@dataclass(frozen=True)
class QuantisedLine:
    """The experts of one place, or the linear layers of one name, in fewer bits. `covered` of
    these `parts` are really quantised; errors are those of the weights, as a share of their
    norm: over all, and of the worst part.

    With calibration data, `fewest` is how many rows the part that saw fewest saw, `few` are the
    parts that saw too few and were rounded to nearest; `nearest` and `solved` are the errors of
    the products on these data, with all codes rounded to nearest and with those that are used.
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
    """How far an output of the quantised model is from the unquantised one's over the cases of
    the verification: the difference as a share of the norm, and in how many of the rows (tokens)
    the greatest value stands elsewhere."""

    output: str
    error: float
    moved: int
    rows: int


@dataclass(frozen=True)
class TunedLine:
    """One kernel that was measured with several sets of tuning values.

    `values` is the best set (empty: the default), `gains` its speed relative to the default by the
    number of tokens, `noise` twice the standard error of their mean, as a share. `from_cache`:
    an earlier compilation measured them. `why`: the reason where the kernel was not measured.
    """

    kernel: str
    values: Mapping[str, int] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.0
    from_cache: bool = False
    why: str = ""


@dataclass(frozen=True)
class LoopLine:
    """An op that became a plain loop though there are kernels for such ops, and why."""

    where: str
    op: str
    reason: str


@dataclass(frozen=True)
class ReportData:
    """Everything that a person may ask about a compilation. `bytes_out` None: not packed."""

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
    quantised: tuple[QuantisedLine, ...] = ()
    moved: tuple[MovedLine, ...] = ()
    tuned: tuple[TunedLine, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    damage: tuple[Damage, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As one JSON document holds it: plain dicts, lists and numbers."""
        return asdict(self)

    @classmethod
    def of_dict(cls, recorded: Mapping[str, Any]) -> Self:
        """The report that `to_dict` wrote; fields that this version does not know are left out.

        Raises ArtifactError where it is malformed: it may come from a stranger's artifact.
        """
        try:
            return msgspec.convert(recorded, cls)
        except msgspec.ValidationError as error:
            raise ArtifactError(
                f"the report is malformed: {error}; compile the model again"
            ) from error
