"""Runs programs on calibration data: statistics of layers, and distances between models.

Every program runs in eager PyTorch with bf16 and f16 widened to float32, so that rounding does not
hide or cause a distance. Weights that programs share are widened once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from moec.dtypes import FLOATS
from moec.errors import SetupError
from moec.ir.graph import Graph, Program, Value
from moec.ir.interpret.evaluate import evaluate
from moec.ir.upcast import widen
from moec.oracle.table_ids import table_rows
from moec.passes.calibration.data import Calibration, Inputs
from moec.passes.core.damage import Distance
from moec.passes.core.moe_layer import Layer

LAYERS_A_RUN = 8  # layers whose rows are in memory at once

Tensors = tuple[torch.Tensor, ...]
Members = tuple[tuple[int, ...], ...]
"""For each expert of a changed layer, the ids of the original's experts that it replaces."""


@dataclass(frozen=True, eq=False)
class LayerStats:
    """A MoE layer on the calibration data, T tokens: the experts' input `x` [T, D], the router's
    `logits` [T, E], its choices `experts` i64[T, k] with `weights` f32[T, k], and `norms`
    f32[T, k] of the chosen experts' results, times their weights."""

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


class LayerRef(Protocol):
    """A layer that passes may change, an MoE block or another one: its name and its result."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> Value: ...


@dataclass(eq=False)
class ExpertLineage:
    """A layer of the original program, and which original experts each current expert replaces;
    `members` is None for a layer without a router."""

    layer: LayerRef
    members: Members | None


@dataclass(eq=False)
class Evaluator:
    """Measures the distance of programs from `original`, the program before any approximate pass.

    `layers` maps results of the original program to its layers. `results` are its outputs, case by
    case; `choices` are its routers' expert ids, i64[T, k], by layer.
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
        runs = list(self.run(self.original, probes))
        self.results = [parts[: len(self.outputs)] for parts in runs]
        ids = zip(*(parts[len(self.outputs) :] for parts in runs), strict=True)
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
        """The number of tokens that a layer routes, over all cases."""
        return max((len(ids) for ids in self.choices.values()), default=self.calibration.tokens)

    def check_size(self) -> None:
        """Raises UsageError if an expert gets fewer than 16 tokens on average, or if the
        model has no float output to compare."""
        if not self.outputs:
            raise SetupError("all outputs of the model are integers: no distance can be measured")
        for key, layer in self.layers.items():
            need, tokens = 16 * layer.count // layer.routing.k, len(self.choices[key])
            if tokens < need:
                raise SetupError(
                    f"the calibration data hold {tokens} tokens, too few to distinguish the "
                    f"{layer.count} experts of {layer.name}: give at least {need}"
                )

    def run(
        self, program: Program, probes: Sequence[Value], cases: Sequence[Inputs] | None = None
    ) -> Iterator[Tensors]:
        """For each case the float outputs of the program, followed by the `probes`."""
        graph, weights, states = self.widened(program, probes)
        for case in self.calibration.cases if cases is None else cases:
            inputs = [float32(tensor) for tensor in (*case, *states)]
            with torch.no_grad():  # left before the caller goes on
                results = evaluate(graph, inputs, weights)
            yield results

    def widened(
        self, program: Program, probes: Sequence[Value] = ()
    ) -> tuple[Graph, dict[str, torch.Tensor], list[torch.Tensor]]:
        """In float32: a graph of the float outputs and the `probes`, its weights by name, and the
        contents of its states."""
        graph = replace(
            program.graph,
            outputs=(*(program.graph.outputs[i] for i in self.outputs), *probes),
            states=(),
        )
        wide = widen(graph)
        read = {p.name: program.weights[p.name] for p in wide.params}
        held = {id(tensor) for tensor in read.values()}
        self._wide = {key: pair for key, pair in self._wide.items() if key in held}
        weights = {name: self._widened(tensor) for name, tensor in read.items()}
        return wide, weights, [program.weights[s.before.name] for s in program.graph.states]

    def _widened(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in (torch.bfloat16, torch.float16):
            return tensor
        cached = self._wide.get(id(tensor))
        if cached is None or cached[0] is not tensor:
            cached = self._wide[id(tensor)] = (tensor, tensor.float())
        return cached[1]

    def layer_stats(self, program: Program, layers: Sequence[Layer]) -> Iterator[LayerStats]:
        """The statistics of each layer in this program, computed a few layers at a time."""
        for start in range(0, len(layers), LAYERS_A_RUN):
            group = layers[start : start + LAYERS_A_RUN]
            probes = [value for layer in group for value in _observed_values(layer)]
            parts: list[list[Tensors]] = [[] for _ in group]
            for results in self.run(program, probes):
                probed = results[len(self.outputs) :]
                for position, layer in enumerate(group):
                    parts[position].append(
                        _reduce_norms(layer, probed[6 * position : 6 * position + 6])
                    )
            for layer_parts in parts:
                yield LayerStats(
                    *(torch.cat(tensors) for tensors in zip(*layer_parts, strict=True))
                )

    def rows_of(self, program: Program, value: Value) -> torch.Tensor:
        """A value of the program, [R, D]: the rows of all cases concatenated."""
        return _rows([results[-1] for results in self.run(program, [value])])

    def measure(
        self,
        program: Program,
        lineages: Mapping[Value, ExpertLineage] | None = None,
        outputs: Sequence[Value] = (),
    ) -> tuple[Distance, dict[Value, float], list[torch.Tensor]]:
        """The program's distance from the original; for each layer of `lineages` the share of
        tokens whose experts changed; and the rows [R, D] of each of `outputs`, results of layers.
        """
        lineages = lineages or {}
        alive = [key for key, t in lineages.items() if t.members is not None]
        probes = [self.layers[key].route.outputs[1] for key in alive]
        probes += outputs
        sums = _Sums()
        ids: list[Tensors] = []
        rows: list[Tensors] = []
        for case, results, right in zip(
            self.calibration.cases, self.run(program, probes), self.results, strict=True
        ):
            sums.add(results[: len(self.outputs)], right, self.text, case)
            probed = results[len(self.outputs) :]
            ids.append(probed[: len(alive)])
            rows.append(probed[len(alive) :])
        shares = dict.fromkeys(lineages, 1.0)
        for key, parts in zip(alive, zip(*ids, strict=True), strict=True):
            members = lineages[key].members
            assert members is not None
            shares[key] = changed_share(self.choices[key], torch.cat(parts), members)
        distance = sums.distance(sum(shares.values()) / max(len(shares), 1))
        return distance, shares, [_rows(parts) for parts in zip(*rows, strict=True)]

    def _language_model(self) -> tuple[int, int] | None:
        """The index of the input with token ids, and of the float output with the scores of the
        next token, of a causal language model; None for any other model. Causal: a change of the
        last token of a text changes no score before it."""
        graph = self.original.graph
        for i, value in enumerate(graph.inputs):
            rows = table_rows(graph, value)
            for position, o in enumerate(self.outputs):
                scores = graph.outputs[o]
                fits = value.shape == scores.shape[:-1] and len(value.shape) > 0
                width = scores.shape[-1] if scores.shape else 0
                if rows and fits and isinstance(width, int) and width >= rows:
                    return (i, position) if self._causal(i, position, rows) else None
        return None

    def _causal(self, i: int, position: int, rows: int) -> bool:
        names = {str(value.shape[:1]) for value in self.original.graph.inputs}
        case = self.calibration.cases[0]
        if len(names) == 1 and self.original.graph.inputs[i].shape[0] != 1:
            case = tuple(tensor[:1] for tensor in case)
        if case[i].shape[-1] < 2:
            return False
        other = tuple(tensor.clone() for tensor in case)
        other[i][..., -1] = (other[i][..., -1] + 1) % rows
        runs = self.run(self.original, (), (case, other))
        a, b = (results[position][..., :-1, :] for results in runs)
        return bool((a - b).norm() <= 1e-3 * a.norm())


def _rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows [R, D] of all parts, which may hold sequences of different lengths."""
    return torch.cat([part.flatten(0, -2) for part in parts])


def _observed_values(layer: Layer) -> tuple[Value, ...]:
    weights, experts = layer.route.outputs
    rows, order = layer.experts.outputs[0], layer.dispatch.outputs[1]
    return layer.dispatch.inputs[0], experts, weights, rows, order, layer.route.inputs[0]


def _reduce_norms(layer: Layer, probed: Tensors) -> Tensors:
    x, ids, weights, rows, order, logits = probed
    lengths = torch.zeros(ids.numel())
    lengths[order.long()] = rows.float().norm(dim=-1)
    norms = lengths.reshape(ids.shape)
    weighted = bool(layer.combine.attrs.get("weighted"))
    return x, ids, weights.float(), norms * weights.float() if weighted else norms, logits


@dataclass
class _Sums:
    """The sums, over cases, that distances are computed from: squared errors and norms, KL
    divergence, and negative log likelihood in nats."""

    off: float = 0.0
    norm: float = 0.0
    kl: float = 0.0
    nats: float = 0.0
    tokens: int = 0
    predicted: int = 0

    def add(
        self, results: Tensors, right: Tensors, text: tuple[int, int] | None, case: Tensors
    ) -> None:
        for actual, expected in zip(results, right, strict=True):
            self.off += float((actual - expected).norm()) ** 2
            self.norm += float(expected.norm()) ** 2
        if text is None:
            return
        ids = case[text[0]]
        q, p = (t[text[1]].log_softmax(-1) for t in (results, right))
        self.kl += float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())
        self.tokens += ids.numel()
        self.nats -= float(q[..., :-1, :].gather(-1, ids[..., 1:, None].long()).sum())
        self.predicted += ids[..., 1:].numel()

    def distance(self, share: float) -> Distance:
        error = math.sqrt(self.off / self.norm) if self.norm else math.sqrt(self.off)
        if not self.tokens:
            return Distance(error, share)
        return Distance(
            error, share, max(self.kl / self.tokens, 0.0), _exp(self.nats / self.predicted)
        )


def changed_share(original: torch.Tensor, ids: torch.Tensor, members: Members) -> float:
    """The share of tokens whose experts are not exactly those of the original: one is another
    expert, or replaces more than one."""
    alone = torch.tensor([experts[0] if len(experts) == 1 else -1 for experts in members] + [-2])
    now = alone[ids.clamp(max=len(members))]
    if now.shape != original.shape:
        return 1.0
    same = (now.sort(-1).values == original.sort(-1).values).all(-1)
    return 1.0 - float(same.double().mean())


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def float32(tensor: torch.Tensor) -> torch.Tensor:
    """A bf16 or f16 tensor as float32; any other tensor unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
