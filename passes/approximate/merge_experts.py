"""Merges experts with similar results: their neurons are aligned, then averaged.

    logits = aten.linear(x, w[8, D])            logits = aten.linear(x, w[8, D])
    w, ids = moe.route(logits)                  mass = aten.linear(softmax(logits), members[4, 8])
    … = moe.dispatch(x, ids) <8>         ->     w, ids = moe.route(log(mass))
    out = moe.experts(…, w1[8, H, D], …)        … = moe.dispatch(x, ids) <4>
                                                out = moe.experts(…, w1[4, H, D], …)

The score of a merged expert is the sum of its members' probabilities, so no routing probability is
lost. Clusters are computed from all experts' outputs for the same tokens (average linkage over the
cosine distance). Two experts may hold the same neurons in another order, so neurons are matched by
their weights before they are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.errors import NoMatch
from moec.ir.graph import Graph, Program, Value
from moec.ir.traits import IDENTITIES, is_pointwise
from moec.passes.calibration.evaluator import LayerStats, Members
from moec.passes.calibration.session import Change
from moec.passes.core.moe_layer import Layer, Splice, constant, expert_outputs, replace_experts
from moec.passes.core.options import option, validate
from moec.passes.core.router_columns import merge_columns

TOKENS = 256  # tokens whose outputs are compared


@dataclass(frozen=True)
class MergeExperts:
    """Merge experts of similar results into one: neurons are aligned, then averaged by usage."""

    keep: float = option(0.5, "share of each layer's experts after merging", low=0, high=1)
    name: ClassVar[str] = "merge-experts"
    source: ClassVar[str] = "clusters: arXiv 2410.08589; alignment and mean: arXiv 2310.01334"

    def __post_init__(self) -> None:
        validate(self)

    def change(self, program: Program, layer: Layer, stats: LayerStats) -> Change:
        groups = self.groups(program, layer, stats)
        usage = stats.usage(layer.count).tolist()
        changed = merge_groups(program, layer, groups, usage)
        return Change(changed, groups, f"merges {_describe_groups(groups)} of {layer.count}")

    def groups(self, program: Program, layer: Layer, stats: LayerStats) -> Members:
        """The experts that become one, by the similarity of their results. Raises NoMatch."""
        count = round(self.keep * layer.count)
        if count == layer.count:
            raise NoMatch(
                f"keep={self.keep:g} of {layer.count} experts keeps all of them: "
                "nothing would change"
            )
        if count < layer.routing.k:
            raise NoMatch(
                f"keep={self.keep:g} of {layer.count} experts is {count}, and each token needs "
                f"{layer.routing.k}"
            )
        stacks = _stacks(program, layer)
        return cluster_experts(expert_outputs(layer, stacks, stats.x[:TOKENS]).flatten(1), count)


def merge_groups(program: Program, layer: Layer, groups: Members, usage: Sequence[int]) -> Program:
    """The program in which each group of the layer's experts is one, their mean by `usage`, which
    is how often each was chosen. Raises NoMatch for a router or weights that cannot be merged."""
    stacks = _stacks(program, layer)
    assert layer.experts.body is not None
    axes = neuron_axes(layer.experts.body)
    splice = Splice(program)
    merge_columns(splice, layer, groups)
    merged = [merge_weights(stacks, axes, group, torch.tensor(usage)) for group in groups]
    replace_experts(splice, layer, [torch.stack([e[param] for e in merged]) for param in stacks])
    return splice.done()


def _stacks(program: Program, layer: Layer) -> dict[Value, torch.Tensor]:
    """The experts' weights by the params of their body, [E, ...] each. Raises NoMatch."""
    body = layer.experts.body
    assert body is not None
    stacks = dict(zip(body.params, (constant(program, s) for s in layer.stacks), strict=True))
    for stack in stacks.values():
        if not stack.is_floating_point():
            raise NoMatch(f"the experts' weights are {stack.dtype}, whose mean is not defined")
    return stacks


def _describe_groups(groups: Members) -> str:
    return ", ".join("+".join(map(str, group)) for group in groups if len(group) > 1)


def cluster_experts(results: torch.Tensor, count: int) -> Members:
    """`count` groups of the rows of [E, N], by average linkage over their cosine distance; each
    group in rising order, and the groups in the order of their first members."""
    unit = torch.nn.functional.normalize(results.double(), dim=-1)
    far = 1 - unit @ unit.T
    groups: list[tuple[int, ...]] = [(e,) for e in range(len(results))]
    while len(groups) > count:
        pairs = [
            (float(far[list(a)][:, list(b)].mean()), i, i + 1 + j)
            for i, a in enumerate(groups)
            for j, b in enumerate(groups[i + 1 :])
        ]
        _, i, j = min(pairs)
        joined = tuple(sorted((*groups[i], *groups[j])))
        groups = [*groups[:i], *groups[i + 1 : j], *groups[j + 1 :], joined]
    return tuple(sorted(groups))


def merge_weights(
    stacks: Mapping[Value, torch.Tensor],
    axes: Mapping[Value, int],
    group: Sequence[int],
    usage: torch.Tensor,
) -> dict[Value, torch.Tensor]:
    """The mean of a group's experts weighted by usage, their neurons aligned with the most used
    expert's. A group without usage is averaged evenly."""
    first = max(group, key=lambda e: int(usage[e]))
    shares = usage[list(group)].double()
    shares = shares / shares.sum() if shares.sum() else torch.full_like(shares, 1 / len(group))
    total = {
        param: torch.zeros_like(stack[0], dtype=torch.float32) for param, stack in stacks.items()
    }
    for e, share in zip(group, shares.tolist(), strict=True):
        expert = {param: stack[e].float() for param, stack in stacks.items()}
        if e != first:
            order = align_neurons({p: s[first].float() for p, s in stacks.items()}, expert, axes)
            expert = {
                p: t.index_select(axes[p], order) if p in axes else t for p, t in expert.items()
            }
        for param, tensor in expert.items():
            total[param] += share * tensor
    return {param: total[param].to(stack.dtype) for param, stack in stacks.items()}


def align_neurons(
    reference: Mapping[Value, torch.Tensor],
    other: Mapping[Value, torch.Tensor],
    axes: Mapping[Value, int],
) -> torch.Tensor:
    """For each neuron of `reference` the neuron of `other` with the most similar weights:
    i64[H], a permutation. Similarity is the sum over the matrices of cosine similarities."""
    parts = []
    for param, axis in axes.items():
        a, b = (side[param].movedim(axis, 0).reshape(side[param].shape[axis], -1)
                for side in (reference, other))  # fmt: skip
        parts.append(torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T)
    return assign(torch.stack(parts).sum(0))


def assign(gain: torch.Tensor) -> torch.Tensor:
    """The permutation p, i64[N], with the greatest sum of gain[i, p[i]]; gain is [N, N]."""
    from scipy.optimize import linear_sum_assignment  # takes long, and few compilations need it

    _, columns = linear_sum_assignment(gain.double().numpy(), maximize=True)
    return torch.from_numpy(columns)


def neuron_axes(body: Graph) -> Mapping[Value, int]:
    """The axis of the hidden neurons of each param that has one: 0 for a weight [H, D] or a bias
    [H] of the first layers, 1 for a weight [D, H] of the last.

    Raises NoMatch if the body is not linear layers, functions of each element, and linear
    layers again, so that neurons cannot be put in another order.
    """
    axes: dict[Value, int] = {}
    hidden: set[Value] = set()
    outer: set[Value] = {body.inputs[0]}
    for op in body.ops:
        rows = [v for v in op.inputs if v not in body.params]
        output = op.outputs[0]
        if (
            op.name == "aten.linear.default"
            and op.inputs[0] in outer
            and output not in body.results
        ):
            axes |= dict.fromkeys(op.inputs[1:], 0)
            hidden.add(output)
        elif op.name == "aten.linear.default" and op.inputs[0] in hidden:
            axes[op.inputs[1]] = 1
            outer.add(output)
        elif (is_pointwise(op) or op.name in IDENTITIES) and rows:
            reads_hidden = {v in hidden for v in rows}
            if len(reads_hidden) > 1:
                raise NoMatch(f"an expert's body adds {output.name} to what enters it")
            vectors = [v for v in op.inputs if v in body.params and v.shape]
            if reads_hidden == {True}:
                axes |= dict.fromkeys(vectors, 0)
            (hidden if reads_hidden == {True} else outer).add(output)
        else:
            raise NoMatch(f"an expert's body holds {op.name}, which may mix its neurons")
    if not hidden or not set(body.results) <= outer:
        raise NoMatch("an expert has no hidden neurons that could be aligned")
    sizes = {param.shape[axis] for param, axis in axes.items()}
    if len(sizes) > 1:
        raise NoMatch(f"an expert's hidden layers have {sorted(map(str, sizes))} neurons")
    return axes
