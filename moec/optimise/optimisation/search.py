"""Searches for the choices that suit limits of memory and of quality.

Damage is predicted for each format of each product (sensitivity.py) and each setting of each layer
of experts (expert_moves.py) as if damages added up, and the choice is solved (solve.py); then the
changed model is measured as a whole. A choice that exceeds the limit of quality is solved again for
less predicted damage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from moec.errors import SetupError, UsageError
from moec.ir.formats.notation import Format
from moec.ir.graph import Program, Stage
from moec.model.compiled import CompiledModel
from moec.optimise.optimisation.expert_moves import SHARED, Settings, measure_layers, measure_shared
from moec.optimise.optimisation.loss import Loss
from moec.optimise.optimisation.pinned import PinnedFormat
from moec.optimise.optimisation.sensitivity import StoredProduct, damage_of, measure_products
from moec.optimise.optimisation.solve import SolvedChoice, solve
from moec.passes.approximate.choices.changeable import (
    Constants,
    changeable_layers,
    shared_experts,
)
from moec.passes.approximate.choices.choose_experts import change_experts, in_order
from moec.passes.approximate.choices.model_choices import (
    ModelChoices,
    ProductChoice,
    significant,
)
from moec.passes.approximate.training.recover_routers import router_weights, training_data
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.core.damage import Distance
from moec.passes.core.runner import Log, Pass, run
from moec.passes.quantise.fixed_formats import FixedFormats
from moec.passes.quantise.gptq_codes import CalibratedQuantisation
from moec.passes.quantise.quantise_linears import LINEAR
from moec.runtime.checks import show_bytes

EXPERT_FORMATS = "expert-formats"
"""The move that chooses formats of single experts."""
TRIES = 6
"""How often a choice is solved again for less damage."""


@dataclass(frozen=True)
class ChoiceLimits:
    """The most bytes of all weights, the most of them that a token reads, and the limit of quality;
    at least one is set."""

    memory: int | None = None
    token_bytes: int | None = None
    loss: Loss | None = None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f"memory {show_bytes(self.memory)}"
        token = "" if self.token_bytes is None else f"{show_bytes(self.token_bytes)} for a token"
        return ", ".join(filter(None, (memory, token, str(self.loss or ""))))


@dataclass(frozen=True, eq=False)
class MeasuredPick:
    """What was solved, the lowered program without its formats, and the distance from the original
    with them."""

    pick: SolvedChoice
    lowered: Program
    distance: Distance


@dataclass(frozen=True, eq=False)
class ChoiceSearch:
    """A model with the costs of everything that can be chosen: compiled without code, where the
    last passes, `lowering`, lower its blocks. `calib` is as `moec.compile` takes it; `rest` is the
    bytes of the weights that no choice changes, `token_rest` those of them that a token reads;
    `declined` are reasons why something cannot be chosen; `recover` is how many steps the routers
    are to be trained for; `constants` are those of layers without a part of their experts."""

    compiled: CompiledModel
    lowering: tuple[Pass, ...]
    calib: Any
    evaluator: Evaluator
    products: tuple[StoredProduct, ...]
    layers: Settings
    rest: int
    token_rest: int
    declined: tuple[str, ...]
    recover: int
    constants: Constants

    def choices(self, limits: ChoiceLimits) -> ModelChoices:
        """Raises UsageError where nothing is within the limits, or nothing needs a change."""
        with self.compiled.source.memory.reading():
            best = self._within_loss(limits) if limits.loss else self._within_sizes(limits)
            if not best.pick.formats and not best.pick.changed_layers:
                raise UsageError(
                    "moec optimize: the limit allows the weights as they are: use moec compile"
                    if limits.loss is None
                    else f"{limits.loss}: no format of any product is within it"
                )
            return self._with_codes(best, limits)

    def token_bytes(self, minimised: str) -> int:
        """The bytes that a token reads: of the weights as they are for the least "damage", or the
        fewest "token_bytes"."""
        pick = self.solve(minimised)
        assert pick is not None, "nothing is limited"
        return self.token_rest + pick.token_bytes

    @property
    def metric(self) -> Literal["kl", "squared error"]:
        return "squared error" if self.evaluator.origin.kl is None else "kl"

    def solve(self, minimised: str, **limits: float | None) -> SolvedChoice | None:
        return solve(self.products, self.layers, minimised, **limits)

    def _rooms(self, limits: ChoiceLimits) -> dict[str, int | None]:
        """The bytes for what can be changed. Raises UsageError where the smallest do not fit."""
        rooms: dict[str, int | None] = {"bytes": None, "token_bytes": None}
        for name, what, limit, rest in (
            ("bytes", "memory", limits.memory, self.rest),
            ("token_bytes", "the limit of a token", limits.token_bytes, self.token_rest),
        ):
            if limit is None:
                continue
            smallest = self.solve(name)
            assert smallest is not None, "nothing is limited"
            if limit < rest + (least := int(getattr(smallest, name))):
                raise UsageError(
                    f"{what} is {show_bytes(limit)}, and the weights take "
                    f"{show_bytes(rest + least)} in the smallest formats, {show_bytes(rest)} of "
                    "which no format changes: allow more, name smaller formats, or more moves"
                )
            rooms[name] = limit - rest
        return rooms

    def _within_sizes(self, limits: ChoiceLimits) -> MeasuredPick:
        pick = self.solve("damage", **self._rooms(limits))
        assert pick is not None, "the smallest choices fit"
        return self.measured(pick)

    def _within_loss(self, limits: ChoiceLimits) -> MeasuredPick:
        """The fewest bytes whose measured loss is within the limit."""
        rooms, loss, origin = self._rooms(limits), limits.loss, self.evaluator.origin
        assert loss is not None
        limit = loss.allowed(origin)
        allowed = target = loss.damage(limit, origin)
        for _ in range(TRIES):
            pick = self.solve("bytes", damage=target, token_bytes=rooms["token_bytes"])
            if pick is None or pick.bytes > (rooms["bytes"] or pick.bytes):
                break
            best = self.measured(pick)
            if loss.value(best.distance) <= limit:
                return best
            excess = damage_of(best.distance) / max(allowed, 1e-12)
            target = min(target, pick.damage) * min(0.9, 1 / excess)
        else:
            raise UsageError(
                f"{loss}: every choice exceeds it; the last one had "
                f"{loss.value(best.distance):.3g}, where {limit:.3g} are allowed"
            )
        nearest = loss.value(self._within_sizes(limits).distance)
        takes = "more" if pick is None else f"about {show_bytes(self.rest + pick.bytes)} of weights"
        raise UsageError(
            f"{loss} takes {takes}, and the limit is {replace(limits, loss=None)}, where the best "
            f"choice has {loss.metric} {nearest:.3g}: allow more loss, or more memory"
        )

    def measured(self, pick: SolvedChoice) -> MeasuredPick:
        """The model with a choice, its codes rounded to nearest."""
        results, memory = self.compiled.pass_results, self.compiled.source.memory
        lowered, changed = results[-1].program, results[-1 - len(self.lowering)].program
        for name, setting in in_order(pick.changed_layers):
            changed = change_experts(changed, name, setting, self.constants)
        if pick.changed_layers:
            lowered = run(changed, self.lowering, stage=Stage.MOE, memory=memory)[-1].program
        stored = FixedFormats(pick.formats).run(lowered, Log(memory=memory))
        return MeasuredPick(pick, lowered, self.evaluator.measure(stored)[0])

    def _with_codes(self, best: MeasuredPick, limits: ChoiceLimits) -> ModelChoices:
        """The choices, with codes that GPTQ chooses where these are measured to be better."""
        pick, formats = best.pick, FixedFormats(best.pick.formats)
        nearest = gptq = damage_of(best.distance)
        if pick.formats:
            source = self.compiled.source
            calibrated = CalibratedQuantisation(formats, self.calib, source.files)
            solved = calibrated.run(best.lowered, Log(memory=source.memory))
            gptq = damage_of(self.evaluator.measure(solved)[0])
        return ModelChoices(
            limits=str(limits),
            bytes=self.rest + pick.bytes,
            token_bytes=self.token_rest + pick.token_bytes,
            metric=self.metric,
            damage=significant(min(nearest, gptq)),
            predicted=significant(pick.damage),
            codes="gptq" if gptq < nearest else "nearest",
            products=self._left(pick),
            layers=pick.changed_layers,
            declined=self.declined,
            recover=self.recover,
        )

    def _left(self, pick: SolvedChoice) -> dict[str, ProductChoice]:
        """What is chosen for each product of which something is left, with the bytes of that."""
        left = {}
        for name, layer in ((product.name, product.layer) for product in self.products):
            option, setting = pick.options[name], pick.settings.get(layer)
            part = len(setting.experts) / setting.of if setting else 1
            if part:
                left[name] = msgspec.structs.replace(option, bytes=round(option.bytes * part))
        return left


def measured_search(
    compiled: CompiledModel,
    lowering: tuple[Pass, ...],
    calib: Any,
    formats: Sequence[Format],
    moves: Collection[str],
    pinned: Sequence[PinnedFormat] = (),
    recover: int = 0,
) -> ChoiceSearch:
    """The costs of all that can be chosen, measured on the data. Raises UsageError where routers
    are to be trained, and there are none or too few data."""
    source, results = compiled.source, compiled.pass_results
    program, lowered = results[-1 - len(lowering)].program, results[-1].program
    log = Log(memory=source.memory)
    if recover:
        training_data(calib, lowered, source.files)
        if not router_weights(lowered.graph):
            raise SetupError("recover trains routers, and the model has none with stored weights")
    evaluator = Evaluator(lowered, load_calibration(calib, lowered, source.files))
    layers = changeable_layers(program, log)
    shared = shared_experts(program, layers, log) if SHARED in moves else {}
    by_expert = EXPERT_FORMATS in moves
    products = measure_products(
        lowered, evaluator, formats, layers, shared, log, by_expert=by_expert, pinned=pinned
    )
    settings, constants = measure_layers(program, evaluator, layers, moves, log)
    without, means = measure_shared(program, evaluator, shared, log)
    changeable = sum(product.options[0].bytes_before for product in products)
    total, read = stored_sizes(lowered)
    counts = Counter(declined.reason for declined in log.declined)
    declined = tuple(f"{count} x {reason}" for reason, count in counts.items())
    return ChoiceSearch(
        *(compiled, lowering, calib, evaluator, products, {**settings, **without}),
        *(total - changeable, read - changeable, declined, recover, {**constants, **means}),
    )


def stored_sizes(program: Program) -> tuple[int, int]:
    """The bytes of all weights, and of all but tables of embeddings, which a token does not read. A
    weight that a product and another op read, such as a table that is the head too, is stored in
    two layouts."""
    total = read = 0
    for param in program.graph.params:
        names = {op.name for op in program.graph.readers.get(param, ())}
        size = program.weights[param.name].nbytes
        total += size * (2 if len(names) > 1 and LINEAR in names else 1)
        read += size if names - {"aten.embedding.default"} else 0
    return total, read
