"""Runs programs on calibration data: what a layer sees there, and how far a change takes a model.

Every program runs in eager PyTorch, with bf16 and f16 widened to float32, so that what is
measured is a change of meaning. Weights that programs share are widened once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from moec.dtypes import FLOATS
from moec.errors import UsageError
from moec.interpret.evaluate import evaluate
from moec.interpret.random_inputs import table_rows
from moec.ir.graph import Program, Value
from moec.ir.upcast import widen
from moec.passes.calibration.data import Calibration, Inputs
from moec.passes.core.damage import Distance
from moec.passes.core.moe_layer import Layer

LAYERS_A_RUN = 8  # whose rows are held at once

Tensors = tuple[torch.Tensor, ...]
Members = tuple[tuple[int, ...], ...]
"""For each expert of a changed layer, which of the original's it stands for."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer does on the calibration data, T tokens: `x` [T, D] that enters its experts,
    `experts` i64[T, k] and `weights` f32[T, k] that the router chose by `logits` [T, E], and
    `norms` f32[T, k] of what each chosen expert gave, times its weight."""

    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    norms: torch.Tensor
    logits: torch.Tensor

    def usage(self, count: int) -> torch.Tensor:
        """How many choices fell on each of `count` experts: i64[E]."""
        return torch.bincount(self.experts.flatten(), minlength=count)[:count]

    def saliency(self, count: int) -> torch.Tensor:
        """The mean norm of what each expert adds to the tokens that chose it: f64[E]; 0 where
        none did. (Router-weighted expert activation pruning, arXiv 2510.13999.)"""
        flat = self.experts.flatten()
        total = torch.zeros(count + 1, dtype=torch.float64)
        total.scatter_add_(0, flat.clamp(max=count), self.norms.flatten().double())
        return total[:count] / self.usage(count).clamp(min=1)


class Place(Protocol):
    """A layer that passes may change, MoE block or not: its name, and the value that it gives."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> Value: ...


@dataclass(eq=False)
class Tracked:
    """A layer of the original and, as passes go by, which of its experts each expert stands for;
    `members` is None where no router is left, or none of the original's was."""

    layer: Place
    members: Members | None


@dataclass(eq=False)
class Meter:
    """Measures how far programs are from `original`, the one before any approximate pass.

    `layers` are the original's, by the value that each gives. `results` are the original's
    outputs case by case, `choices` its routers' choices, i64[T, k] by layer.
    """

    original: Program
    calibration: Calibration
    layers: Mapping[Value, Layer] = field(default_factory=dict)
    _wide: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.original.graph
        self.outputs = [i for i, v in enumerate(graph.outputs) if v.dtype in FLOATS]
        self.text = self._language_model()
        probes = [layer.route.outputs[1] for layer in self.layers.values()]
        made = list(self.run(self.original, probes))
        self.results = [parts[: len(self.outputs)] for parts in made]
        ids = zip(*(parts[len(self.outputs) :] for parts in made), strict=True)
        self.choices = (
            {key: torch.cat(parts) for key, parts in zip(self.layers, ids, strict=True)}
            if self.layers
            else {}
        )
        sums = _Sums()
        for case, result in zip(self.calibration.cases, self.results, strict=True):
            sums.add(result, result, self.text, case)
        self.origin = sums.distance(0.0)

    @property
    def tokens(self) -> int:
        """How many tokens a layer routes, over all cases."""
        return max((len(ids) for ids in self.choices.values()), default=self.calibration.tokens)

    def check_size(self) -> None:
        """Raises UsageError where the data are too few to tell the experts apart, or where
        nothing that the model gives can be compared."""
        if not self.outputs:
            raise UsageError("the model gives whole numbers alone: no distance can be measured")
        for key, layer in self.layers.items():
            need, found = 16 * layer.count // layer.routing.k, len(self.choices[key])
            if found < need:
                raise UsageError(
                    f"the calibration data hold {found} tokens, too few to tell the {layer.count} "
                    f"experts of {layer.name} apart: give at least {need}"
                )

    def run(
        self, program: Program, probes: Sequence[Value], cases: Sequence[Inputs] | None = None
    ) -> Iterator[Tensors]:
        """For each case the float outputs of the program, and after them the probed values."""
        graph = replace(
            program.graph,
            outputs=(*(program.graph.outputs[i] for i in self.outputs), *probes),
            states=(),
        )
        wide = widen(graph)
        read = {p.name: program.weights[p.name] for p in wide.params}
        held = {id(t) for t in (*read.values(), *self.original.weights.values())}
        self._wide = {key: pair for key, pair in self._wide.items() if key in held}
        weights = {name: self._widened(tensor) for name, tensor in read.items()}
        states = [program.weights[s.before.name] for s in program.graph.states]
        for case in self.calibration.cases if cases is None else cases:
            inputs = [float32(tensor) for tensor in (*case, *states)]
            with torch.no_grad():
                yield evaluate(wide, inputs, weights)

    def _widened(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in (torch.bfloat16, torch.float16):
            return tensor
        known = self._wide.get(id(tensor))
        if known is None or known[0] is not tensor:
            known = self._wide[id(tensor)] = (tensor, tensor.float())
        return known[1]

    def seen(self, program: Program, layers: Sequence[Layer]) -> Iterator[Seen]:
        """What each of the layers does on the data in this program, a few layers at a time."""
        for start in range(0, len(layers), LAYERS_A_RUN):
            some = layers[start : start + LAYERS_A_RUN]
            probes = [value for layer in some for value in _observed(layer)]
            parts: list[list[Tensors]] = [[] for _ in some]
            for made in self.run(program, probes):
                found = made[len(self.outputs) :]
                for place, layer in enumerate(some):
                    parts[place].append(_reduced(layer, found[6 * place : 6 * place + 6]))
            for own in parts:
                yield Seen(*(torch.cat(tensors) for tensors in zip(*own, strict=True)))

    def held(self, program: Program, value: Value) -> torch.Tensor:
        """What a value of the program holds, the rows of all cases joined."""
        return _rows([made[-1] for made in self.run(program, [value])])

    def measure(
        self,
        program: Program,
        tracked: Mapping[Value, Tracked] | None = None,
        outputs: Sequence[Value] = (),
    ) -> tuple[Distance, dict[Value, float], list[torch.Tensor]]:
        """How far the program is from the original; for each tracked layer the share of tokens
        whose experts changed; and what `outputs`, those of some layers, hold."""
        tracked = tracked or {}
        alive = [key for key, t in tracked.items() if t.members is not None]
        probes = [self.layers[key].route.outputs[1] for key in alive]
        probes += outputs
        sums = _Sums()
        ids: list[Tensors] = []
        rows: list[Tensors] = []
        for case, made, right in zip(
            self.calibration.cases, self.run(program, probes), self.results, strict=True
        ):
            sums.add(made[: len(self.outputs)], right, self.text, case)
            found = made[len(self.outputs) :]
            ids.append(found[: len(alive)])
            rows.append(found[len(alive) :])
        shares = dict.fromkeys(tracked, 1.0)
        for key, parts in zip(alive, zip(*ids, strict=True), strict=True):
            members = tracked[key].members
            assert members is not None
            shares[key] = changed(self.choices[key], torch.cat(parts), members)
        distance = sums.distance(sum(shares.values()) / max(len(shares), 1))
        return distance, shares, [_rows(parts) for parts in zip(*rows, strict=True)]

    def _language_model(self) -> tuple[int, int] | None:
        """Which input holds token ids and which of the float outputs the scores of the next
        token, where the model is a causal language model: changing a text's last token changes
        no score before it."""
        graph = self.original.graph
        for i, value in enumerate(graph.inputs):
            rows = table_rows(graph, value)
            for place, o in enumerate(self.outputs):
                scores = graph.outputs[o]
                fits = value.shape == scores.shape[:-1] and len(value.shape) > 0
                width = scores.shape[-1] if scores.shape else 0
                if rows and fits and isinstance(width, int) and width >= rows:
                    return (i, place) if self._causal(i, place, rows) else None
        return None

    def _causal(self, i: int, place: int, rows: int) -> bool:
        names = {str(value.shape[:1]) for value in self.original.graph.inputs}
        case = self.calibration.cases[0]
        if len(names) == 1 and self.original.graph.inputs[i].shape[0] != 1:
            case = tuple(tensor[:1] for tensor in case)
        if case[i].shape[-1] < 2:
            return False
        other = tuple(tensor.clone() for tensor in case)
        other[i][..., -1] = (other[i][..., -1] + 1) % rows
        made = self.run(self.original, (), (case, other))
        a, b = (results[place][..., :-1, :] for results in made)
        return bool((a - b).norm() <= 1e-3 * a.norm())


def _rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows [R, D] of all parts, which may hold sequences of different lengths."""
    return torch.cat([part.flatten(0, -2) for part in parts])


def _observed(layer: Layer) -> tuple[Value, ...]:
    weights, experts = layer.route.outputs
    rows, order = layer.experts.outputs[0], layer.dispatch.outputs[1]
    return layer.dispatch.inputs[0], experts, weights, rows, order, layer.route.inputs[0]


def _reduced(layer: Layer, found: Tensors) -> Tensors:
    x, ids, weights, rows, order, logits = found
    lengths = torch.zeros(ids.numel())
    lengths[order.long()] = rows.float().norm(dim=-1)
    norms = lengths.reshape(ids.shape)
    weighted = bool(layer.combine.attrs.get("weighted"))
    return x, ids, weights.float(), norms * weights.float() if weighted else norms, logits


@dataclass
class _Sums:
    """What the distances add up from, case by case."""

    off: float = 0.0
    whole: float = 0.0
    kl: float = 0.0
    nats: float = 0.0
    tokens: int = 0
    predicted: int = 0

    def add(
        self, made: Tensors, right: Tensors, text: tuple[int, int] | None, case: Tensors
    ) -> None:
        for got, wanted in zip(made, right, strict=True):
            self.off += float((got - wanted).norm()) ** 2
            self.whole += float(wanted.norm()) ** 2
        if text is None:
            return
        ids = case[text[0]]
        q, p = (t[text[1]].log_softmax(-1) for t in (made, right))
        self.kl += float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())
        self.tokens += ids.numel()
        self.nats -= float(q[..., :-1, :].gather(-1, ids[..., 1:, None].long()).sum())
        self.predicted += ids[..., 1:].numel()

    def distance(self, share: float) -> Distance:
        error = math.sqrt(self.off / self.whole) if self.whole else math.sqrt(self.off)
        if not self.tokens:
            return Distance(error, share)
        return Distance(
            error, share, max(self.kl / self.tokens, 0.0), _exp(self.nats / self.predicted)
        )


def changed(original: torch.Tensor, ids: torch.Tensor, members: Members) -> float:
    """The share of tokens that are not sent to just the experts that the original sends them to:
    another one, or one that stands for more than itself."""
    alone = torch.tensor([own[0] if len(own) == 1 else -1 for own in members] + [-2])
    now = alone[ids.clamp(max=len(members))]
    if now.shape != original.shape:
        return 1.0
    same = (now.sort(-1).values == original.sort(-1).values).all(-1)
    return 1.0 - float(same.double().mean())


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def float32(tensor: torch.Tensor) -> torch.Tensor:
    """bf16 and f16 widened; any other tensor itself."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
