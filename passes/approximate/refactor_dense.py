"""The dense feed-forward networks of a model become MoE blocks that share one router.

                                            e = aten.embedding(embed, ids)
                                            … the router's layer …
                                            w, i = moe.route(logits)       once, before all layers
    g = aten.linear(x, w1[H, D])            rows, order, ends = moe.dispatch(x, i)
    a = aten.silu(g)                  ->    out = moe.experts(rows, ends, w1[E, C, D], …)
    y = aten.linear(a, w2[D, H])            own = moe.combine(out, order)
                                            y = aten.add(own, …w1[P, D], w2[D, P]…)

The calibration data are grouped by domain, and each domain keeps the channels that are strongest on
its data. P channels are kept by all domains: the permanent expert, which every token uses. The C
others of a domain are its expert. A token uses the one expert that the router chooses, the same in
all layers. The router is trained to choose, for each token, the expert that holds most of its
strongest channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from moec.errors import NoMatch, SetupError, UsageError
from moec.ir.graph import Attr, DType, Graph, Op, Program, TensorType, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.sizes.dims import product
from moec.ir.upcast import widen
from moec.passes.approximate.causal_router import HEADS, causal_router, distill
from moec.passes.approximate.feedforward import FeedForwardOps, body, feedforwards, weights
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.calibration.session import Change
from moec.passes.core.inline import inline_body
from moec.passes.core.moe_layer import Splice, constant
from moec.passes.core.options import option, validate
from moec.passes.core.runner import Log

FEWEST = 256
"""How many tokens of a domain its channels are chosen on."""
HELD = 1 << 30
"""Bytes of channels that are in memory at once."""


@dataclass(frozen=True, eq=False)
class SharedRouter:
    """The router: its ops, which follow the op `after`, their weights, and the choices i64[T, 1]
    of one of the experts of `domains`."""

    domains: tuple[str, ...]
    after: Op
    ops: tuple[Op, ...]
    weights: Mapping[Value, torch.Tensor]
    choices: Value


@dataclass(frozen=True, eq=False)
class KeptChannels:
    """Which channels of a layer each domain keeps, bool[E, H], and the router of all layers."""

    mask: torch.Tensor
    router: SharedRouter


@dataclass(frozen=True)
class RefactorDense:
    """Replace dense feed-forward layers by experts for domains of text, with one shared router."""

    keep: float = option(0.5, "share of a layer's channels that are used per token", low=0, high=1)
    by: str = option(
        "activation",
        "which channels a domain keeps: those with the greatest mean activation (activation), "
        "mean activation times norm of the output weights (contribution), or random ones",
        choices=("activation", "contribution", "random"),
    )
    width: int = option(64, f"width of the router's layer, a multiple of {HEADS}", low=HEADS)
    steps: int = option(200, "steps of the router's training", low=1)
    seed: int = option(0, "seed of the router and of random channels", low=0)
    name: ClassVar[str] = "refactor-dense"
    source: ClassVar[str] = "Read-ME, arXiv 2410.19123"

    def __post_init__(self) -> None:
        validate(self)
        if self.width % HEADS:
            raise UsageError(
                f"refactor-dense: width is {self.width}, expected a multiple of the router's "
                f"{HEADS} heads"
            )

    def observe(
        self, program: Program, evaluator: Evaluator, log: Log
    ) -> tuple[Sequence[FeedForwardOps], Iterator[KeptChannels]]:
        """The layers that can be changed, and the channels that stay of each. Raises UsageError
        if the data have fewer than two domains, or one of them is too short."""
        _check_domains(evaluator)
        try:
            after = _embedding(program.graph)
        except NoMatch as why:
            log.decline("the model", str(why))
            return [], iter(())
        layers = []
        for ffn in (ffns := list(feedforwards(program.graph, log))):
            try:
                self.check(ffn, after)
                layers.append(ffn)
            except NoMatch as why:
                log.decline(ffn.name, str(why))
        if not ffns:
            log.decline("the model", "it has no dense feed-forward layer that could be found")
        return layers, self.keep_channels(program, evaluator, layers, after, log)

    def check(self, ffn: FeedForwardOps, after: Op) -> None:
        """Raises NoMatch for a layer that the router's choices do not fit, or that keeps no
        channel or all."""
        ids, rows = after.inputs[1], ffn.x.shape[:-1]
        if rows not in (ids.shape, (product(ids.shape),)):
            raise NoMatch(f"its rows {ffn.x} are not one for each token of {ids}")
        if (count := self.count(ffn)) in (0, ffn.channels):
            which = "all" if count else "none"
            raise NoMatch(f"keep={self.keep:g} of {ffn.channels} channels is {which} of them")

    def count(self, ffn: FeedForwardOps) -> int:
        """How many channels each domain keeps."""
        return round(self.keep * ffn.channels)

    def keep_channels(
        self,
        program: Program,
        evaluator: Evaluator,
        layers: Sequence[FeedForwardOps],
        after: Op,
        log: Log,
    ) -> Iterator[KeptChannels]:
        """For each layer the channels that stay, with the router, which all layers train."""
        if not layers:
            return
        masks, overlaps = [], [torch.zeros(())] * len(evaluator.calibration.cases)
        for ffn, sizes in _channel_strengths(program, evaluator, layers, self.by):
            masks.append(self.mask(ffn, sizes, evaluator.calibration.domains))
            overlaps = [o + _overlap(s, masks[-1]) for o, s in zip(overlaps, sizes, strict=True)]
        router = self.router(program, evaluator, after, overlaps, log)
        yield from (KeptChannels(mask, router) for mask in masks)

    def mask(
        self, ffn: FeedForwardOps, sizes: Sequence[torch.Tensor], of: Sequence[str]
    ) -> torch.Tensor:
        """The channels that each domain keeps, bool[E, H], by their `sizes` [T, H] in each case;
        `of` is the domain of each case. Of equal channels, the lower number is kept."""
        # The layer's name in the seed gives each layer other numbers, independent of the order of
        # layers.
        generator = torch.Generator().manual_seed(self.seed + sum(ffn.name.encode()))
        rows = []
        for domain in dict.fromkeys(of):
            domain_sizes = torch.cat(
                [s for s, name in zip(sizes, of, strict=True) if name == domain]
            )
            worth = domain_sizes.mean(0)
            if self.by == "random":
                worth = torch.rand(ffn.channels, generator=generator)
            order = torch.sort(worth, descending=True, stable=True).indices
            rows.append(torch.zeros_like(worth, dtype=torch.bool))
            rows[-1][order[: self.count(ffn)]] = True
        return torch.stack(rows)

    def router(
        self,
        program: Program,
        evaluator: Evaluator,
        after: Op,
        overlaps: Sequence[torch.Tensor],
        log: Log,
    ) -> SharedRouter:
        """The router, trained to choose the expert of greatest overlap f32[T, E]."""
        domains = tuple(dict.fromkeys(evaluator.calibration.domains))
        table, ids = constant(program, after.inputs[0]), program.graph.inputs.index(after.inputs[1])
        embedded = [table[case[ids].long()].float() for case in evaluator.calibration.cases]
        # One scale for all tokens: tokens with a clearly best expert then have the most effect.
        spread = torch.cat([o - o.mean(-1, keepdim=True) for o in overlaps]).std().clamp(min=1e-6)
        targets = [(o / spread).softmax(-1) for o in overlaps]
        graph = causal_router(after.outputs[0], self.width, len(domains))
        trained = distill(widen(graph), embedded, targets, self.steps, self.seed)
        log.says += _describe_choices(
            widen(graph), trained, embedded, evaluator.calibration.domains
        )
        splice = Splice(program)
        params = {
            p: splice.weight(f"router.{p.name}", tensor)
            for p, tensor in zip(graph.params, trained, strict=True)
        }
        ops, logits = inline_body(splice, graph, after.outputs[0], params, "router")
        tokens = logits.shape[0]
        weights = splice.value("router_weights", TensorType("f32", (tokens, 1)))
        choices = splice.value("router_choices", TensorType("i64", (tokens, 1)))
        attrs = {"k": 1, "renormalize": True}
        ops.append(Op("moe.route", (logits,), (weights, choices), attrs, None, "router"))
        return SharedRouter(domains, after, tuple(ops), splice.weights, choices)

    def change(self, program: Program, layer: FeedForwardOps, stats: KeptChannels) -> Change:
        router, permanent = stats.router, stats.mask.all(0)
        private = stats.mask & ~permanent
        shared, each = int(permanent.sum()), int(private[0].sum())
        if not each:
            raise NoMatch("all domains keep the same channels, so the experts would be equal")
        splice = Splice(program)
        if router.choices not in program.graph.producers:
            splice.put(router.after, [router.after, *router.ops])
            splice.weights |= router.weights
            splice.names.names |= {v.name for op in router.ops for v in op.outputs}
        splice.put(layer.down, _emit_experts(splice, layer, permanent, private, router.choices))
        says = (
            f"{shared} of {layer.channels} channels are permanent, {each} more are of each "
            f"expert: {', '.join(router.domains)}"
        )
        return Change(splice.done(), None, says)


def _emit_experts(
    splice: Splice,
    layer: FeedForwardOps,
    permanent: torch.Tensor,
    private: torch.Tensor,
    choices: Value,
) -> list[Op]:
    """The ops of the experts and of the permanent channels, which compute the layer's output.

    `permanent` bool[H] and `private` bool[E, H] are the channels of all experts and of each. The
    bias of the last linear layer belongs to the permanent channels, or without any, to each expert.
    """
    like = replace(layer.down, origin=layer.name)
    flat = TensorType(layer.output.dtype, (choices.shape[0], layer.output.shape[-1]))
    ops: list[Op] = []
    x = layer.x
    if len(x.shape) > 2:
        shape = (choices.shape[0], x.shape[-1])
        type = TensorType(x.dtype, shape)
        x = splice.emit(ops, "aten.reshape.default", (x,), type, like, shape=shape)
    biased = not permanent.any()
    total = _emit_block(splice, ops, layer, x, private, choices, biased)
    if permanent.any():
        always = _emit_permanent(splice, ops, layer, x, permanent)
        total = splice.emit(ops, "aten.add.Tensor", (total, always), flat, like)
    if layer.output.shape != flat.shape:
        type = layer.output.type
        splice.emit(ops, "aten.reshape.default", (total,), type, like, shape=type.shape)
    ops[-1] = replace(ops[-1], outputs=(layer.output,))
    return ops


def _emit_block(
    splice: Splice,
    ops: list[Op],
    layer: FeedForwardOps,
    x: Value,
    private: torch.Tensor,
    choices: Value,
    biased: bool,
) -> Value:
    """The sum [T, D] of the experts' results for the rows x [T, D], by a block added to `ops`;
    with `biased`, each expert has the layer's last bias."""
    count, tokens, dtype = len(private), choices.shape[0], layer.output.dtype
    flat = TensorType(dtype, (tokens, layer.output.shape[-1]))
    stacks = [
        splice.weight(name, torch.stack(slices))
        for name, slices in _expert_weights(splice.program, layer, private, biased)
    ]
    network = body(layer, int(private[0].sum()), biased)
    rows = splice.value("rows", TensorType(x.dtype, x.shape))
    order = splice.value("order", TensorType("i32", (tokens,)))
    ends = splice.value("ends", TensorType("i32", (count,)))
    out = splice.value("out", flat)
    total = splice.value(layer.output.name, flat)
    attrs: dict[str, Attr] = {"k": 1, "tokens": tokens, "dtype": DType(dtype)}
    ops += [
        Op("moe.dispatch", (x, choices), (rows, order, ends), {"num_experts": count}, None,
           layer.name),
        Op("moe.experts", (rows, ends, *stacks), (out,), {}, network, f"{layer.name}.experts"),
        Op("moe.combine", (out, order), (total,), attrs, None, layer.name),
    ]  # fmt: skip
    return total


def _emit_permanent(
    splice: Splice, ops: list[Op], layer: FeedForwardOps, x: Value, permanent: torch.Tensor
) -> Value:
    """The result [T, D] of the permanent channels for the rows x [T, D], by ops added to `ops`."""
    network = body(layer, int(permanent.sum()), True)
    slices = weights(splice.program, layer, permanent.nonzero()[:, 0], True)
    params = {
        param: splice.weight(name, tensor)
        for param, (name, tensor) in zip(network.params, slices, strict=True)
    }
    inner, result = inline_body(splice, network, x, params, f"{layer.name}.permanent")
    ops += inner
    return result


def _expert_weights(
    program: Program, layer: FeedForwardOps, private: torch.Tensor, biased: bool
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Each weight by name, with its part for each expert."""
    slices = [weights(program, layer, mask.nonzero()[:, 0], biased) for mask in private]
    for parts in zip(*slices, strict=True):
        yield parts[0][0], [tensor for _, tensor in parts]


def _channel_strengths(
    program: Program, evaluator: Evaluator, layers: Sequence[FeedForwardOps], by: str
) -> Iterator[tuple[FeedForwardOps, list[torch.Tensor]]]:
    """For each layer how strong its channels are, f32[T, H] case by case."""
    tokens = evaluator.calibration.tokens
    count = max(1, HELD // (4 * tokens * max(ffn.channels for ffn in layers)))
    for start in range(0, len(layers), count):
        group = layers[start : start + count]
        runs = list(evaluator.run(program, [ffn.hidden for ffn in group]))
        for position, ffn in enumerate(group, len(evaluator.outputs)):
            sizes = [results[position].flatten(0, -2).abs() for results in runs]
            if by == "contribution":
                norm = program.weights[ffn.down.inputs[1].name].float().norm(dim=0)
                sizes = [size * norm for size in sizes]
            yield ffn, sizes


def _overlap(sizes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How many of a token's strongest channels each expert holds: f32[T, E]."""
    strongest = sizes.topk(int(mask[0].sum()), dim=-1).indices
    return torch.stack([expert_mask[strongest].sum(-1) for expert_mask in mask.float()], -1)


def _describe_choices(
    graph: Graph,
    trained: Sequence[torch.Tensor],
    embedded: Sequence[torch.Tensor],
    of: Sequence[str],
) -> Iterator[str]:
    """Text that says which experts each domain's tokens are sent to."""
    domains = tuple(dict.fromkeys(of))
    counts = torch.zeros(len(domains), len(domains))
    for e, domain in zip(embedded, of, strict=True):
        (logits,) = run_graph(graph, [e, *trained])
        chosen = torch.bincount(logits.argmax(-1), minlength=len(domains))
        counts[domains.index(domain)] += chosen
    shares = counts / counts.sum(-1, keepdim=True)
    for domain, row in zip(domains, shares, strict=True):
        to = ", ".join(f"{share:.0%} to {name}'s" for name, share in zip(domains, row, strict=True))
        yield f"tokens of {domain} go {to} expert"


def _check_domains(evaluator: Evaluator) -> None:
    of = evaluator.calibration.domains
    if len(set(of)) < 2:
        raise UsageError(
            "refactor-dense makes an expert for each domain of the calibration data: name two or "
            "more, as in --calib code=code.txt,prose=prose.txt"
        )
    for domain in dict.fromkeys(of):
        cases = zip(evaluator.calibration.cases, of, strict=True)
        count = sum(case[0].numel() for case, name in cases if name == domain)
        if count < FEWEST:
            raise SetupError(
                f"the calibration data of {domain} hold {count} tokens, too few to choose channels "
                f"by: give at least {FEWEST}"
            )


def _embedding(graph: Graph) -> Op:
    """The op that looks up the model's tokens [B, S]: of several the one of the largest table."""
    tables = {
        op: rows
        for op in graph.ops
        if op.name == "aten.embedding.default"
        and op.inputs[1] in graph.inputs
        and len(op.inputs[1].shape) == 2
        and isinstance(rows := op.inputs[0].shape[0], int)
    }
    if not tables:
        raise NoMatch("the model has no input of token ids [B, S] that a router could read")
    return max(tables, key=lambda op: tables[op])
