"""Chooses a format for each product's weights, within a limit of memory or of quality.

    moec.optimize(model, calib=..., memory="4GiB")              the least damage that fits
    moec.optimize(model, calib=..., loss="kl<=0.02")            the fewest bytes within the loss
    both                                                        the fewest bytes, if they fit

Damage is predicted for each product (sensitivity.py) as if damages added up, and the choice is
solved (solve.py); then the changed model is measured as a whole. A choice that exceeds the limit of
quality is solved again for less predicted damage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moec.errors import UsageError
from moec.formats.notation import Format
from moec.ir.graph import Program, Stage
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.core.damage import Distance
from moec.passes.core.runner import Kind, Log, OptInPass
from moec.passes.quantise.choose.fixed_formats import FixedFormats
from moec.passes.quantise.choose.loss import Loss
from moec.passes.quantise.choose.sensitivity import (
    StoredProduct,
    damage_of,
    formats_of,
    measure_products,
)
from moec.passes.quantise.choose.solve import FormatChoice, fewest_bytes, least_damage
from moec.passes.quantise.gptq_codes import CalibratedQuantisation
from moec.passes.quantise.quantise_linears import LINEAR
from moec.runtime.checks import show_bytes

FORMATS = tuple(Format(kind, block) for kind, block in (("int8", 0), ("int4", 32), ("int4", 128)))
TRIES = 6
"""How often a choice is solved again for less damage."""


@dataclass(frozen=True, eq=False)
class ChooseFormats(OptInPass):
    """Store each product's weights in the format that suits a limit of memory or of quality.

    `memory` is the most bytes of all weights, `loss` the limit of quality; `calib` and `files` are
    those of `moec.compile`. Raises UsageError where no choice is within the limits.
    """

    memory: int | None = None
    loss: Loss | None = None
    formats: tuple[Format, ...] = FORMATS
    calib: Any = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    name: ClassVar[str] = "choose-formats"
    source: ClassVar[str] = ""
    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.GROUPED
    kind: ClassVar[Kind] = Kind.QUANTISES

    def run(self, program: Program, log: Log) -> Program:
        evaluator = Evaluator(program, load_calibration(self.calib, program, self.files))
        products = measure_products(program, evaluator, self.formats, log)
        changeable = sum(product.options[0].bytes for product in products)
        rest = _stored_bytes(program) - changeable
        room = None if self.memory is None else self.memory - rest
        choice = _Choice(program, evaluator, products, log)
        pick, changed, distance = (
            choice.within_room(self._room(products, room, rest))
            if self.loss is None
            else choice.within_loss(self.loss)
        )
        if all(option.format is None for option in pick.options):
            raise UsageError(
                "moec optimize: the limit allows the weights as they are: use moec compile"
                if self.loss is None
                else f"{self.loss}: no format of any product is within it"
            )
        if room is not None and pick.bytes > room:
            raise UsageError(
                f"{self.loss} takes {show_bytes(rest + pick.bytes)} of weights, and memory is "
                f"{show_bytes(rest + room)}: allow more loss, or more memory"
            )
        solved = choice.with_solved_codes(pick, self.calib, self.files)
        log.says += _lines(pick, rest, distance)
        if damage_of(solved[1]) >= damage_of(distance):
            return changed
        log.says.append(f"with codes chosen by GPTQ on the data: {damage_of(solved[1]):.3g}")
        return solved[0]

    def _room(self, products: tuple[StoredProduct, ...], room: int | None, rest: int) -> int:
        if room is None:
            raise UsageError("moec optimize needs a limit: give --memory, --loss, or both")
        least = sum(min(option.bytes for option in product.options) for product in products)
        if room < least:
            raise UsageError(
                f"memory is {show_bytes(rest + room)}, and the weights take "
                f"{show_bytes(rest + least)} in the smallest formats, {show_bytes(rest)} of which "
                "no format changes: allow more memory, or name smaller formats"
            )
        return room


@dataclass(frozen=True, eq=False)
class _Choice:
    program: Program
    evaluator: Evaluator
    products: tuple[StoredProduct, ...]
    log: Log

    def within_room(self, room: int) -> tuple[FormatChoice, Program, Distance]:
        pick = least_damage(self.products, room)
        assert pick is not None, "the room holds the smallest formats"
        return (pick, *self._changed(pick))

    def within_loss(self, loss: Loss) -> tuple[FormatChoice, Program, Distance]:
        """The fewest bytes whose measured loss is within the limit."""
        limit = loss.allowed(self.evaluator.origin)
        target = loss.damage(limit, self.evaluator.origin)
        for _ in range(TRIES):
            pick = fewest_bytes(self.products, target)
            assert pick is not None, "no product has to be quantised"
            changed, distance = self._changed(pick)
            measured = loss.value(distance)
            if measured <= limit:
                return pick, changed, distance
            excess = damage_of(distance) / max(loss.damage(limit, self.evaluator.origin), 1e-12)
            target = min(target, pick.damage) * min(0.9, 1 / excess)
        raise UsageError(
            f"{loss}: quantising anything exceeds it; the last choice had {measured:.3g}, where "
            f"{limit:.3g} are allowed"
        )

    def with_solved_codes(
        self, pick: FormatChoice, calib: Any, files: Mapping[str, bytes]
    ) -> tuple[Program, Distance]:
        """The choice with codes that GPTQ chooses."""
        rounded = FixedFormats(formats_of(self.products, pick.options))
        changed = CalibratedQuantisation(rounded, calib, files).run(self.program, self.log)
        return changed, self.evaluator.measure(changed)[0]

    def _changed(self, pick: FormatChoice) -> tuple[Program, Distance]:
        formats = FixedFormats(formats_of(self.products, pick.options))
        changed = formats.run(self.program, Log(memory=self.log.memory))
        return changed, self.evaluator.measure(changed)[0]


def _stored_bytes(program: Program) -> int:
    """Those of all weights. A weight that a product and another op read, such as a table of
    embeddings that is the head too, is stored in two layouts."""
    total = 0
    for param in program.graph.params:
        names = {op.name for op in program.graph.readers.get(param, ())}
        total += program.weights[param.name].nbytes * (
            2 if len(names) > 1 and LINEAR in names else 1
        )
    return total


def _lines(pick: FormatChoice, rest: int, distance: Distance) -> list[str]:
    """Sentences for the report: what was chosen, and how well its damage was predicted."""
    counts = Counter(str(option.format or "unchanged") for option in pick.options)
    kinds = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    metric = "squared error" if distance.kl is None else "kl"
    return [
        f"chose {kinds}: {show_bytes(rest + pick.bytes)} of weights, {show_bytes(rest)} of them in "
        "ops that no format changes",
        f"{metric} {damage_of(distance):.3g} measured, {pick.damage:.3g} predicted as a sum over "
        f"products; the solver's gap is {pick.gap:.1%}",
    ]
