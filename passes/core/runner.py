"""The protocol of a pass, and the runner, which checks stages and verifies every result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from moec.errors import IRError
from moec.ir.graph import Program, Stage
from moec.ir.interpret.verifier import verify
from moec.sources.memory.memory import InMemory

if TYPE_CHECKING:
    from moec.passes.core.damage import ChoiceLine, Damage, RoundingStats


LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Declined:
    """A candidate that a rule examined and did not rewrite, with the reason."""

    where: str
    reason: str
    rule: str


@dataclass
class Log:
    """The record of a run of passes. `spend` is called before each rewrite and counts it against
    the fuel. `damage` is the loss of quality of an approximate pass, `fits` the rounding errors of
    calibrated codes, `says` lines and `choices` rows for the report. `memory` is where new weights
    are."""

    fuel: int | None = None
    rewrites: int = 0
    declined: list[Declined] = field(default_factory=list)
    rule: str = ""
    damage: Damage | None = None
    fits: list[RoundingStats] = field(default_factory=list)
    says: list[str] = field(default_factory=list)
    choices: list[ChoiceLine] = field(default_factory=list)
    memory: InMemory = field(default_factory=InMemory)

    def spend(self, what: str) -> bool:
        """Whether one more rewrite is allowed; `what` names it for `moec bisect`."""
        if self.fuel is not None and self.rewrites >= self.fuel:
            return False
        self.rewrites += 1
        self.last = f"{self.rule}: {what}"
        return True

    last: str = ""

    def decline(self, where: str, reason: str, rule: str = "") -> None:
        """Records why a rule did not rewrite `where`. `rule` defaults to the name of the pass."""
        entry = Declined(where, reason, rule or self.rule)
        if entry not in self.declined:
            self.declined.append(entry)


class Kind(Enum):
    """How a pass changes the results of a model."""

    EXACT = "exact"
    CHANGES = "approximate"
    QUANTISES = "quantised"


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; `moec list passes` prints its docstring.

    `takes` is the last stage that its input may have, `gives` the earliest stage of its output:
    GROUPED, which allows all ops, unless a pass says otherwise.
    `binds` maps the names of inputs of the model to the constants that the pass binds them to.
    """

    @property
    def name(self) -> str: ...

    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.GROUPED

    @property
    def kind(self) -> Kind:
        return Kind.EXACT

    @property
    def binds(self) -> Mapping[str, Any]:
        return {}

    def run(self, program: Program, log: Log) -> Program: ...


@runtime_checkable
class OptInPass(Pass, Protocol):
    """A pass that runs on request only and needs no calibration data; `source` names its paper."""

    source: ClassVar[str]


@dataclass(frozen=True)
class PassResult:
    """The result of one pass: its program, seconds, rewrites, and what it declined and why."""

    name: str
    program: Program
    stage: Stage
    seconds: float
    rewrites: int
    declined: tuple[Declined, ...]
    last: str = ""
    damage: Damage | None = None
    kind: Kind = Kind.EXACT
    fits: tuple[RoundingStats, ...] = ()
    says: tuple[str, ...] = ()
    choices: tuple[ChoiceLine, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the pass changed the model's results beyond rounding."""
        if self.kind is Kind.CHANGES:
            return self.damage.applied if self.damage else self.rewrites > 0
        return self.kind is Kind.QUANTISES

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.rewrites} rewrites, {len(self.program.graph.ops)} ops, "
            f"{self.seconds:.2f} s"
        )


def run(
    program: Program,
    passes: Sequence[Pass],
    *,
    stage: Stage = Stage.ATEN,
    fuel: int | None = None,
    watch: Callable[[PassResult], None] | None = None,
    memory: InMemory | None = None,
) -> list[PassResult]:
    """Run passes in order. The first result holds the input program, the last the final one.

    `stage` is the stage of the input, `fuel` caps the rewrites of the run, `watch` is called with
    each result after its pass, `memory` is where new weights are. Raises IRError if a pass takes an
    earlier stage than the graph has, or returns an invalid graph (naming the pass).
    """
    verify(program.graph, stage)
    pass_results = [PassResult("capture", program, stage, 0.0, 0, ())]
    if watch:
        watch(pass_results[0])
    spent = 0
    for pass_ in passes:
        if stage > pass_.takes:
            raise IRError(f"{pass_.name} takes {pass_.takes.name}, the graph is {stage.name}")
        log = Log(
            None if fuel is None else fuel - spent, rule=pass_.name, memory=memory or InMemory()
        )
        start = time.perf_counter()
        program = pass_.run(program, log)
        stage = max(stage, pass_.gives)
        try:
            verify(program.graph, stage)
        except IRError as error:
            before = ", ".join(pass_result.name for pass_result in pass_results)
            raise IRError(f"after {pass_.name} (after {before}): {error}") from error
        spent += log.rewrites
        seconds = time.perf_counter() - start
        declined = tuple(log.declined)
        pass_result = PassResult(
            pass_.name,
            program,
            stage,
            seconds,
            log.rewrites,
            declined,
            log.last,
            log.damage,
            kind=pass_.kind,
            fits=tuple(log.fits),
            says=tuple(log.says),
            choices=tuple(log.choices),
        )
        pass_results.append(pass_result)
        LOGGER.debug("%s", pass_result)
        if watch:
            watch(pass_result)
    return pass_results
