"""Searches for the choices that suit a limit of memory or of quality.

Damage is predicted for each product (sensitivity.py) as if damages added up, and the choice is
solved (solve.py); then the changed model is measured as a whole. A choice that exceeds the limit of
quality is solved again for less predicted damage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.errors import UsageError
from moec.formats.notation import Format
from moec.ir.graph import Program
from moec.memory.memory import InMemory
from moec.optimisation.loss import Loss
from moec.optimisation.sensitivity import StoredProduct, damage_of, formats_of, measure_products
from moec.optimisation.solve import FormatChoice, fewest_bytes, least_damage
from moec.passes.approximate.choices.model_choices import (
    UNCHANGED,
    ModelChoices,
    ProductChoice,
    significant,
)
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.core.damage import Distance
from moec.passes.core.runner import Log
from moec.passes.quantise.fixed_formats import FixedFormats
from moec.passes.quantise.gptq_codes import CalibratedQuantisation
from moec.passes.quantise.quantise_linears import LINEAR
from moec.runtime.checks import show_bytes

TRIES = 6
"""How often a choice is solved again for less damage."""


@dataclass(frozen=True)
class ChoiceLimits:
    """The most bytes of all weights, and the limit of quality; at least one is set."""

    memory: int | None = None
    loss: Loss | None = None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f"memory {show_bytes(self.memory)}"
        return ", ".join(filter(None, (memory, str(self.loss or ""))))


@dataclass(frozen=True, eq=False)
class MeasuredPick:
    """What was solved, the program with it, and the distance of that from the original."""

    pick: FormatChoice
    program: Program
    distance: Distance


@dataclass(frozen=True, eq=False)
class ChoiceSearch:
    """A model with the costs of everything that can be chosen. `rest` is the bytes of the weights
    that no choice changes, `files` are those of the model's source."""

    program: Program
    calib: Any
    files: Mapping[str, bytes]
    memory: InMemory
    evaluator: Evaluator
    products: tuple[StoredProduct, ...]
    rest: int

    def choices(self, limits: ChoiceLimits) -> ModelChoices:
        """Raises UsageError where nothing is within the limits, or nothing needs a change."""
        room = None if limits.memory is None else self._room(limits.memory)
        if limits.loss is None:
            assert room is not None, "a limit is set"
            best = self.within_room(room)
        else:
            best = self._within_both(limits.loss, room)
        if all(option.format is None for option in best.pick.options):
            raise UsageError(
                "moec optimize: the limit allows the weights as they are: use moec compile"
                if limits.loss is None
                else f"{limits.loss}: no format of any product is within it"
            )
        return self._with_codes(best, limits)

    def within_room(self, room: int) -> MeasuredPick:
        """The least damage where products have at most `room` bytes, which the smallest fit."""
        pick = least_damage(self.products, room)
        assert pick is not None, "the room holds the smallest formats"
        return self._measured(pick)

    def _room(self, memory: int) -> int:
        """The bytes for what can be changed. Raises UsageError where the smallest do not fit."""
        least = sum(min(option.bytes for option in product.options) for product in self.products)
        if memory < self.rest + least:
            raise UsageError(
                f"memory is {show_bytes(memory)}, and the weights take "
                f"{show_bytes(self.rest + least)} in the smallest formats, {show_bytes(self.rest)} "
                "of which no format changes: allow more memory, or name smaller formats"
            )
        return memory - self.rest

    def _within_both(self, loss: Loss, room: int | None) -> MeasuredPick:
        best = self.within_loss(loss)
        if room is None or best.pick.bytes <= room:
            return best
        nearest = loss.value(self.within_room(room).distance)
        raise UsageError(
            f"{loss} takes {show_bytes(self.rest + best.pick.bytes)} of weights, and memory is "
            f"{show_bytes(self.rest + room)}, in which the best choice has {loss.metric} "
            f"{nearest:.3g}: allow more loss, or more memory"
        )

    def within_loss(self, loss: Loss) -> MeasuredPick:
        """The fewest bytes whose measured loss is within the limit."""
        limit = loss.allowed(self.evaluator.origin)
        target = loss.damage(limit, self.evaluator.origin)
        for _ in range(TRIES):
            pick = fewest_bytes(self.products, target)
            assert pick is not None, "no product has to be quantised"
            best = self._measured(pick)
            if loss.value(best.distance) <= limit:
                return best
            excess = damage_of(best.distance) / max(
                loss.damage(limit, self.evaluator.origin), 1e-12
            )
            target = min(target, pick.damage) * min(0.9, 1 / excess)
        raise UsageError(
            f"{loss}: quantising anything exceeds it; the last choice had "
            f"{loss.value(best.distance):.3g}, where {limit:.3g} are allowed"
        )

    def _measured(self, pick: FormatChoice) -> MeasuredPick:
        formats = FixedFormats(formats_of(self.products, pick.options))
        changed = formats.run(self.program, Log(memory=self.memory))
        return MeasuredPick(pick, changed, self.evaluator.measure(changed)[0])

    def _with_codes(self, best: MeasuredPick, limits: ChoiceLimits) -> ModelChoices:
        """The choices, with codes that GPTQ chooses where these are measured to be better."""
        formats = FixedFormats(formats_of(self.products, best.pick.options))
        solved = CalibratedQuantisation(formats, self.calib, self.files).run(
            self.program, Log(memory=self.memory)
        )
        nearest = damage_of(best.distance)
        gptq = damage_of(self.evaluator.measure(solved)[0])
        return ModelChoices(
            limits=str(limits),
            bytes=self.rest + best.pick.bytes,
            metric="squared error" if best.distance.kl is None else "kl",
            damage=significant(min(nearest, gptq)),
            predicted=significant(best.pick.damage),
            codes="gptq" if gptq < nearest else "nearest",
            products=tuple(self._product_choices(best.pick)),
        )

    def _product_choices(self, pick: FormatChoice) -> list[ProductChoice]:
        return [
            ProductChoice(
                product=product.name,
                rows=product.rows,
                columns=product.columns,
                format=str(option.format or UNCHANGED),
                bytes=option.bytes,
                bytes_before=product.options[0].bytes,
                damage=significant(option.damage),
            )
            for product, option in zip(self.products, pick.options, strict=True)
        ]


def measured_search(
    program: Program,
    calib: Any,
    files: Mapping[str, bytes],
    memory: InMemory,
    formats: Sequence[Format],
) -> ChoiceSearch:
    """The costs of all that can be chosen, measured on `calib`, as `moec.compile` takes it."""
    evaluator = Evaluator(program, load_calibration(calib, program, files))
    products = measure_products(program, evaluator, formats, Log(memory=memory))
    changeable = sum(product.options[0].bytes for product in products)
    rest = stored_in_layouts(program) - changeable
    return ChoiceSearch(program, calib, files, memory, evaluator, products, rest)


def stored_in_layouts(program: Program) -> int:
    """The bytes of all weights. A weight that a product and another op read, such as a table of
    embeddings that is the head too, is stored in two layouts."""
    total = 0
    for param in program.graph.params:
        names = {op.name for op in program.graph.readers.get(param, ())}
        total += program.weights[param.name].nbytes * (
            2 if len(names) > 1 and LINEAR in names else 1
        )
    return total
