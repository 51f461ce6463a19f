"""How approximate passes run: layer by layer, each change measured, within a budget.

An approximate pass is a frozen dataclass whose fields are its options. In place of `run` it has
`change`, which returns the next program for one layer and the statistics of that layer on the
calibration data. Layers are MoE blocks, or the layers that the pass's `observe` returns.
`MeasuredPass` wraps it as a pass of the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from moec.errors import NoMatch, UsageError
from moec.ir.graph import Program, Stage, Value
from moec.ir.sizes.dims import bind_shape, evaluate_dim, symbols
from moec.ir.stats import product_flops, stored_bytes
from moec.passes.calibration.budget import Budget, BudgetError
from moec.passes.calibration.data import load_calibration, tokens_in
from moec.passes.calibration.evaluator import (
    Evaluator,
    ExpertLineage,
    LayerRef,
    LayerStats,
    Members,
)
from moec.passes.core.damage import Damage, Distance, LayerDamage
from moec.passes.core.moe_layer import Layer, layer_of, name_of
from moec.passes.core.options import show
from moec.passes.core.runner import Kind, Log, Pass


@dataclass(frozen=True, eq=False)
class Change:
    """The change of one layer: the next program, for each new expert the layer's experts that it
    replaces (None if no router is left), and a description for the report."""

    program: Program
    members: Members | None
    says: str


@runtime_checkable
class Approximate(Protocol):
    """A pass that changes the results of a model. It runs only on request."""

    source: ClassVar[str]

    @property
    def name(self) -> str: ...

    def change(self, program: Program, layer: Any, stats: Any) -> Change:
        """Changes `layer` by its statistics: a `Layer` and `LayerStats`, or a layer and an item
        of `observe`. Raises NoMatch for a layer that it cannot change."""
        ...


@runtime_checkable
class CustomCalibration(Protocol):
    """An approximate pass that selects its layers and computes their statistics itself."""

    def observe(
        self, program: Program, evaluator: Evaluator, log: Log
    ) -> tuple[Sequence[LayerRef], Iterator[Any]]:
        """The layers, and for each, in the same order, the `stats` of `change`. Raises UsageError
        for data that are not enough."""
        ...


@runtime_checkable
class NeedsGlobalStats(Protocol):
    """An approximate pass that needs the statistics of all layers before it changes the first."""

    def planned(self, program: Program, layers: Iterable[tuple[Layer, LayerStats]]) -> Approximate:
        """The pass that changes these layers, and only these."""
        ...


@dataclass(eq=False)
class CalibrationSession:
    """The state that the approximate passes of one compilation share: data, budget, and the
    distance so far from the model before the first of them. `original` is the program before the
    choices of moec optimize."""

    calib: Any
    files: Mapping[str, bytes]
    budget: Budget = field(default_factory=Budget)
    strict: bool = False
    evaluator: Evaluator | None = None
    lineages: dict[Value, ExpertLineage] = field(default_factory=dict)
    distance: Distance | None = None
    original: Program | None = None

    def start(self, program: Program) -> Evaluator:
        """The evaluator of this compilation; the first call measures `program` as the original."""
        if self.evaluator is not None:
            return self.evaluator
        data = load_calibration(self.calib, program, self.files)
        layers = layers_of(program, Log())
        self.evaluator = evaluator = Evaluator(
            program, data, {layer.output: layer for layer in layers}
        )
        evaluator.check_size()
        self.lineages = {
            layer.output: ExpertLineage(layer, tuple((e,) for e in range(layer.count)))
            for layer in layers
        }
        self.distance = evaluator.origin
        self._check_budget()
        return evaluator

    @property
    def started(self) -> Evaluator:
        """The evaluator, after `start`."""
        assert self.evaluator is not None
        return self.evaluator

    def _check_budget(self) -> None:
        assert self.distance is not None
        for metric, _ in self.budget.limits:
            if getattr(self.distance, metric) is None:
                raise UsageError(
                    f"--budget {self.budget}: {metric} needs a causal language model, which this "
                    "model is not: limit error or changed"
                )
        if breach := self.budget.breach(self.distance):
            raise UsageError(f"--budget {self.budget}: {breach} before any pass has run")


@dataclass(frozen=True, eq=False)
class _MeasuredChange:
    """What the change of one layer does: its damage, the lineages of the experts after it, and the
    rows [R, D] of the next layer's result."""

    damage: LayerDamage
    lineages: dict[Value, ExpertLineage]
    next_rows: dict[Value, torch.Tensor]


@dataclass(frozen=True, eq=False)
class MeasuredPass(Pass):
    """An approximate pass in the pipeline."""

    inner: Approximate
    session: CalibrationSession
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE
    kind: ClassVar[Kind] = Kind.CHANGES

    @property
    def name(self) -> str:
        return self.inner.name

    def run(self, program: Program, log: Log) -> Program:
        """Change layer after layer. Raises BudgetError for a breach where the session is strict."""
        session = self.session
        evaluator = session.start(program)
        before, damages = program, list[LayerDamage]()
        layers, observed = self._observed(before, evaluator, log)
        inner = self._planned(before, evaluator)
        rows: dict[Value, torch.Tensor] = {}  # of the next layer in the current program
        followers = [*layers[1:], None][: len(layers)]
        for layer, follower, stats in zip(layers, followers, observed, strict=True):
            try:
                change = inner.change(program, layer, stats)
            except NoMatch as why:
                log.decline(layer.name, str(why))
                continue
            if not log.spend(f"{layer.name}: {change.says}"):
                break
            measured = self._measure(program, change, layer, follower, rows.pop(layer.output, None))
            damages.append(measured.damage)
            if measured.damage.undone:
                log.decline(layer.name, measured.damage.says)
                continue
            program, session.lineages = change.program, measured.lineages
            session.distance = measured.damage.after
            rows = measured.next_rows
        log.damage = self._total_damage(before, program, damages)
        return program

    def _planned(self, program: Program, evaluator: Evaluator) -> Approximate:
        """The pass, with the layers that it changes where that depends on all of them."""
        if not isinstance(self.inner, NeedsGlobalStats):
            return self.inner
        experts = layers_of(program, Log())
        stats = evaluator.layer_stats(program, experts)
        return self.inner.planned(program, zip(experts, stats, strict=True))

    def _measure(
        self,
        program: Program,
        change: Change,
        layer: LayerRef,
        follower: LayerRef | None,
        rows: torch.Tensor | None,
    ) -> _MeasuredChange:
        """Measure the change of `layer` in `program`, where its result is `rows` [R, D] (None:
        compute it). A breach of the budget is undone. Raises BudgetError for one where the session
        is strict."""
        session, evaluator = self.session, self.session.started
        lineage = session.lineages.get(layer.output, ExpertLineage(layer, None))
        lineages = {**session.lineages, layer.output: _compose_lineage(change, lineage)}
        outputs = [layer.output] + ([follower.output] if follower else [])
        distance, shares, results = evaluator.measure(change.program, lineages, outputs)
        if rows is None:
            rows = evaluator.rows_of(program, layer.output)
        breach = session.budget.breach(distance)
        if breach and session.strict:
            raise BudgetError(
                f"{show(self.inner)} at {layer.name}: {breach}; leave out --strict to keep "
                "this layer as it is"
            )
        damage = LayerDamage(
            layer.name,
            f"undone: {breach}" if breach else change.says,
            bool(breach),
            0 if breach else stored_bytes(program) - stored_bytes(change.program),
            0.0 if breach else self._flops(program) - self._flops(change.program),
            float((results[0] - rows).norm() / rows.norm().clamp(min=1e-30)),
            shares[layer.output],
            distance,
        )
        next_rows = dict(zip(outputs[1:], results[1:], strict=True))
        return _MeasuredChange(damage, lineages, next_rows)

    def _total_damage(
        self, before: Program, after: Program, damages: Sequence[LayerDamage]
    ) -> Damage:
        """The damage of the pass: of all layers together, and of each."""
        session, evaluator = self.session, self.session.started
        assert session.distance is not None
        return Damage(
            show(self.inner),
            evaluator.tokens,
            str(session.budget),
            stored_bytes(before),
            stored_bytes(after),
            self._flops(before),
            self._flops(after),
            evaluator.origin,
            session.distance,
            tuple(damages),
        )

    def _observed(
        self, program: Program, evaluator: Evaluator, log: Log
    ) -> tuple[Sequence[LayerRef], Iterator[Any]]:
        if isinstance(self.inner, CustomCalibration):
            return self.inner.observe(program, evaluator, log)
        layers = layers_of(program, log)
        return layers, evaluator.layer_stats(program, layers)

    def _flops(self, program: Program) -> float:
        """FLOPs per token in the first case of the data. Tokens are those that a block routes, or
        without blocks those of the first input. A size that data decide, such as the rows of an
        expert that is in no block, counts as all tokens."""
        evaluator = self.session.started
        sizes: dict[str, int] = {}
        inputs, case = program.graph.inputs, evaluator.calibration.cases[0]
        for value, tensor in zip(inputs, case, strict=False):
            bind_shape(value.shape, tuple(tensor.shape), sizes)
        tokens = [evaluate_dim(output.shape[0], sizes) for output in evaluator.layers]
        read = tokens_in(inputs[0], case[0])
        names = {n for v in program.graph.values() for dim in v.shape for n in symbols(dim)}
        sizes = dict.fromkeys(names, read) | sizes
        return product_flops(program.graph, sizes) / max(tokens, default=read)


def layers_of(program: Program, log: Log) -> list[Layer]:
    """The blocks whose experts and router can be changed."""
    layers = []
    for op in program.graph.ops:
        if op.name == "moe.experts":
            try:
                layers.append(layer_of(program.graph, op))
            except NoMatch as why:
                log.decline(name_of(op), str(why))
    return layers


def _compose_lineage(change: Change, before: ExpertLineage) -> ExpertLineage:
    """The lineage after a change: the original experts that each new expert replaces."""
    if change.members is None or before.members is None:
        return ExpertLineage(before.layer, None)
    originals = before.members
    members = tuple(tuple(o for e in experts for o in originals[e]) for experts in change.members)
    return ExpertLineage(before.layer, members)
