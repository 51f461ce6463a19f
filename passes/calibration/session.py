"""How passes run that change a model: layer by layer, each change measured, within a budget.

Such a pass is a frozen dataclass whose fields are its options, as every pass; in the place of
`run` it has `change`, which makes the next program from one layer and what that layer saw on the
calibration data. Layers are MoE blocks, or those that the pass itself finds. Here it becomes a
pass of the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from moec.errors import NoMatch, UsageError
from moec.ir.dims import bind, evaluate_dim
from moec.ir.graph import Program, Stage, Value
from moec.ir.stats import product_flops, stored_bytes
from moec.passes.calibration.budget import Budget, BudgetError
from moec.passes.calibration.data import calibration, tokens_in
from moec.passes.calibration.evaluator import Members, Meter, Place, Seen, Tracked
from moec.passes.core.damage import Damage, Distance, LayerDamage
from moec.passes.core.moe_layer import Layer, layer_of, name_of
from moec.passes.core.options import show
from moec.passes.core.runner import Kind, Log, Pass


@dataclass(frozen=True, eq=False)
class Change:
    """What a pass makes of one layer: the next program, which of the layer's experts each new
    expert stands for (None where no router is left), and what was done, in words."""

    program: Program
    members: Members | None
    says: str


@runtime_checkable
class Approximate(Protocol):
    """A pass that changes what a model computes. Never run unless asked for."""

    source: ClassVar[str]

    @property
    def name(self) -> str: ...

    def change(self, program: Program, layer: Any, seen: Any) -> Change:
        """The program with a layer (a `Layer`, or what `observe` finds) changed by what was
        `seen` (a `Seen`, or what `observe` gives). Raises NoMatch for one it cannot change."""
        ...


@runtime_checkable
class Observing(Protocol):
    """An approximate pass that finds its layers itself, and looks at the data in its own way."""

    def observe(
        self, program: Program, meter: Meter, log: Log
    ) -> tuple[Sequence[Place], Iterator[Any]]:
        """The layers, and in their order what `change` is told of each. Raises UsageError for
        data that tell too little."""
        ...


@runtime_checkable
class Foresighted(Protocol):
    """An approximate pass that looks at all layers before it changes the first."""

    def planned(self, program: Program, layers: Iterable[tuple[Layer, Seen]]) -> Approximate:
        """The pass that makes the changes; it is asked for those layers alone."""
        ...


@dataclass(eq=False)
class Frame:
    """What the approximate passes of one compilation share: the data, the budget, the distance
    so far. The model before the first of them is the one that all are measured against."""

    calib: Any
    files: Mapping[str, Path]
    budget: Budget = field(default_factory=Budget)
    strict: bool = False
    meter: Meter | None = None
    tracked: dict[Value, Tracked] = field(default_factory=dict)
    distance: Distance | None = None

    def start(self, program: Program) -> Meter:
        """Measure the program as it is, once."""
        if self.meter is not None:
            return self.meter
        data = calibration(self.calib, program, self.files)
        layers = _layers(program, Log())
        self.meter = meter = Meter(program, data, {layer.output: layer for layer in layers})
        meter.check_size()
        self.tracked = {
            layer.output: Tracked(layer, tuple((e,) for e in range(layer.count)))
            for layer in layers
        }
        self.distance = meter.origin
        self._check_budget()
        return meter

    def _check_budget(self) -> None:
        assert self.distance is not None
        for metric, _ in self.budget.limits:
            if getattr(self.distance, metric) is None:
                raise UsageError(
                    f"--budget {self.budget}: {metric} is that of a causal language model, which "
                    "this one is not; limit error or changed"
                )
        if breach := self.budget.breach(self.distance):
            raise UsageError(f"--budget {self.budget}: {breach} before any pass has run")


@dataclass(frozen=True, eq=False)
class Measured(Pass):
    """An approximate pass in the pipeline."""

    inner: Approximate
    frame: Frame
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE
    kind: ClassVar[Kind] = Kind.CHANGES

    @property
    def name(self) -> str:
        return self.inner.name

    def run(self, program: Program, log: Log) -> Program:
        """Change layer after layer. Raises BudgetError for a breach where the frame is strict."""
        frame = self.frame
        meter = frame.start(program)
        before = program
        done: list[LayerDamage] = []
        layers, observed = self._observed(before, meter, log)
        inner = self.inner
        if isinstance(inner, Foresighted):
            experts = _layers(program, Log())
            inner = inner.planned(before, zip(experts, meter.seen(before, experts), strict=True))
        held: dict[Value, torch.Tensor] = {}  # what layers give in the program as it stands
        for layer, following, seen in zip(
            layers, [*layers[1:], None][: len(layers)], observed, strict=True
        ):
            try:
                change = inner.change(program, layer, seen)
            except NoMatch as why:
                log.decline(layer.name, str(why))
                continue
            if not log.spend(f"{layer.name}: {change.says}"):
                break
            tracked = dict(frame.tracked)
            known = tracked.get(layer.output, Tracked(layer, None))
            tracked[layer.output] = _composed(change, known)
            outputs = [layer.output] + ([following.output] if following else [])
            distance, shares, made = meter.measure(change.program, tracked, outputs)
            right = held.pop(layer.output, None)
            if right is None:
                right = meter.held(program, layer.output)
            breach = frame.budget.breach(distance)
            if breach and frame.strict:
                raise BudgetError(
                    f"{show(self.inner)} at {layer.name}: {breach}; leave out --strict to keep "
                    "this layer as it is"
                )
            line = LayerDamage(
                layer.name,
                f"undone: {breach}" if breach else change.says,
                bool(breach),
                0 if breach else stored_bytes(program) - stored_bytes(change.program),
                0.0 if breach else self._flops(program) - self._flops(change.program),
                float((made[0] - right).norm() / right.norm().clamp(min=1e-30)),
                shares[layer.output],
                distance,
            )
            done.append(line)
            if breach:
                log.decline(layer.name, line.says)
                continue
            program, frame.tracked, frame.distance = change.program, tracked, distance
            held = dict(zip(outputs[1:], made[1:], strict=True))
        assert frame.distance is not None
        log.damage = Damage(
            show(self.inner),
            meter.tokens,
            str(frame.budget),
            stored_bytes(before),
            stored_bytes(program),
            self._flops(before),
            self._flops(program),
            meter.origin,
            frame.distance,
            tuple(done),
        )
        return program

    def _observed(
        self, program: Program, meter: Meter, log: Log
    ) -> tuple[Sequence[Place], Iterator[Any]]:
        if isinstance(self.inner, Observing):
            return self.inner.observe(program, meter, log)
        layers = _layers(program, log)
        return layers, meter.seen(program, layers)

    def _flops(self, program: Program) -> float:
        """A token's, in the first case of the data: one that a block routes, or the model reads."""
        meter = self.frame.meter
        assert meter is not None
        sizes: dict[str, int] = {}
        inputs, case = program.graph.inputs, meter.calibration.cases[0]
        for value, tensor in zip(inputs, case, strict=False):
            bind(value.shape, tuple(tensor.shape), sizes)
        tokens = [evaluate_dim(output.shape[0], sizes) for output in meter.layers]
        read = tokens_in(inputs[0], case[0])
        return product_flops(program.graph, sizes) / max(tokens, default=read)


def _layers(program: Program, log: Log) -> list[Layer]:
    found = []
    for op in program.graph.ops:
        if op.name == "moe.experts":
            try:
                found.append(layer_of(program.graph, op))
            except NoMatch as why:
                log.decline(name_of(op), str(why))
    return found


def _composed(change: Change, before: Tracked) -> Tracked:
    """Whom the new experts stand for among the original's."""
    if change.members is None or before.members is None:
        return Tracked(before.layer, None)
    known = before.members
    members = tuple(tuple(o for e in own for o in known[e]) for own in change.members)
    return Tracked(before.layer, members)
