"""Finds out by experiments what an eager module computes as a mixture of experts.

Nothing is traced; the module runs as it is. A function mode replaces its router's logits with
chosen ones, hooks record what submodules read, and least squares solves each expert's weight for
each token from the output. Rules are fitted to the weights, and the replacement is proved against
the module.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from moec.capture.behaviour.inference.added import SAFE, find_added
from moec.capture.behaviour.inference.cases import BehaviourCase
from moec.capture.behaviour.inference.draws import all_on, draws, ties
from moec.capture.behaviour.inference.drops import find_capacity
from moec.capture.behaviour.inference.fit import fit
from moec.capture.behaviour.inference.probe import Probe, affordable_lengths
from moec.capture.behaviour.inference.sources import find_experts, find_router
from moec.capture.behaviour.inference.thresholds import narrowed
from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.description import Description, RoutingRule
from moec.capture.behaviour.layer.parts import expert_groups, shaken
from moec.capture.behaviour.proof.proof import Differs, Proof, prove
from moec.capture.behaviour.replacement import choices
from moec.errors import NoMatch
from moec.oracle.tolerance import are_close

_ROWS = 96
"""Tokens of one experiment."""
_MOST_RULES = 6
"""The most rules that are proved, of those that fit equally well, before the module is refused."""


class NoExperts(NoMatch):
    """A module has no parts that look like experts, which need not be reported."""


def recognise(module: nn.Module, arguments: Arguments) -> Proof:
    """The proved description of a module. Raises NoMatch, with the reason, where there is none."""
    probe = Probe(module, arguments)
    groups = list(expert_groups(module, probe.width))
    if not groups:
        raise NoExperts("it has no list of like submodules that may be experts")
    probe.module = shaken(module)
    probe.longest, probe.farthest = affordable_lengths(probe)
    _check_repeats(probe)
    reasons: list[tuple[int, str]] = []
    suspect: BehaviourCase | None = None
    for names in groups:
        try:
            for description in _descriptions(probe, names):
                try:
                    return prove(module, probe, description, suspect)
                except Differs as why:
                    suspect = why.case
                    reasons.append((2, str(why)))
                except NoMatch as why:
                    reasons.append((2, str(why)))
        except NoMatch as why:
            reasons.append((1, str(why)))
    raise NoMatch(max(reasons, key=lambda reason: reason[0])[1])


def _check_repeats(probe: Probe) -> None:
    before = copy.deepcopy(probe.module.state_dict())
    tokens = probe.tokens(2, 12)
    first, second = probe.run(tokens).leaves, probe.run(tokens).leaves
    for (_, a), (_, b) in zip(first, second, strict=True):
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            raise NoMatch("two runs on one input differ: it draws random numbers or keeps a state")
    for name, value in probe.module.state_dict().items():
        if not torch.equal(value, before[name]):
            raise NoMatch(f"a run changes {name}: it keeps a state")


def _descriptions(probe: Probe, names: tuple[str, ...]) -> Iterator[Description]:
    """Descriptions that the experiments suggest, the likeliest first."""
    probe.columns = len(names)
    why = (
        f"{len(names)} like parts, but no product with {len(names)} columns, a row for each token, "
        "chooses among them"
    )
    for name, weight in _tensors(probe, names).items():
        if weight.dim() != 2 or probe.columns not in weight.shape:
            continue
        probe.description, probe.weight_name = Description(experts=names), name
        observed = probe.run(probe.tokens(2, 12)).logits
        if observed is None or observed.numel() != 24 * probe.columns:
            continue
        try:
            yield from _routed(probe)
        except NoMatch as reason:
            why = str(reason)
    raise NoMatch(why)


def _tensors(probe: Probe, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Parameters and buffers that do not belong to experts."""
    every = {**dict(probe.module.named_parameters()), **dict(probe.module.named_buffers())}
    inside = tuple(f"{name}." for name in names)
    return {n: t for n, t in every.items() if not n.startswith(inside)}


def _routed(probe: Probe) -> Iterator[Description]:
    """Descriptions of a module whose logits are a product with `probe.weight_name`."""
    columns, generator = probe.columns, torch.Generator().manual_seed(5)
    tokens, kinds = probe.tokens(1, _ROWS), draws(columns, _ROWS, generator)
    _check_steers(probe, tokens, kinds)
    calls = probe.watch(tokens)
    observed = probe.run(tokens).logits
    if observed is None:
        raise NoMatch(f"some runs do not multiply with {probe.weight_name}: one expert is drawn")
    find_experts(probe, calls, tokens, kinds["usual"])
    router = find_router(probe, observed.reshape(-1, columns), tokens.reshape(-1, probe.width))
    probe.watch(tokens, all_on(0, _ROWS, columns))
    added = find_added(probe, tokens)
    probe.description = replace(probe.description, router=router, added=added)
    _check_alone(probe, tokens, kinds["usual"])
    logits, solved = _solved(probe, tokens, generator)
    for fitted in itertools.islice(fit(logits, solved, _corrections(probe)), _MOST_RULES):
        rule = fitted.rule
        if fitted.interval:
            rule = narrowed(probe, rule, fitted.interval, logits, tokens)
        complete = replace(probe.description, capacity=find_capacity(probe))
        for tied in _ties(probe, rule, tokens, generator):
            yield replace(complete, routing=tied)


def _check_steers(probe: Probe, tokens: torch.Tensor, kinds: Mapping[str, torch.Tensor]) -> None:
    """Checks that logits matter, and that with fixed routing no token changes another's output."""
    moved = tokens.clone()
    moved.view(-1, probe.width)[-1] += 1
    one, usual = probe.run(tokens, kinds["one"]).hidden, probe.run(tokens, kinds["usual"]).hidden
    if are_close(one, usual):
        raise NoMatch(f"other logits than those of {probe.weight_name} change nothing")
    if not are_close(usual[:-1], probe.run(moved, kinds["usual"]).hidden[:-1]):
        raise NoMatch(
            "with the routing held, one token changes another's output: tokens meet inside it, "
            "as in attention"
        )


def _check_alone(probe: Probe, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """Checks that the choices of the first tokens do not depend on the logits of later tokens."""
    later = torch.cat([logits[:SAFE], logits[SAFE:].roll(1, 1) * 3])
    first, second = (probe.solve(tokens, z)[0][:SAFE, : probe.columns] for z in (logits, later))
    if not are_close(first, second, 1e-3):
        raise NoMatch(
            "a token's weights depend on the logits of later tokens, as where experts choose "
            "their tokens or the best tokens are served first"
        )


def _corrections(probe: Probe) -> dict[str, torch.Tensor]:
    biases = {f"{n}.bias" for n, m in probe.module.named_modules() if isinstance(m, nn.Linear)}
    return {
        name: t
        for name, t in _tensors(probe, probe.description.experts).items()
        if t.shape == (probe.columns,) and name not in biases
    }


def _solved(
    probe: Probe, tokens: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every kind, and the weights [T, E] that the module gives its experts for them."""
    logits, weights = [], []
    for _ in range(10):
        for drawn in draws(probe.columns, _ROWS, generator).values():
            solved, _ = probe.solve(tokens, drawn)
            logits.append(drawn[:SAFE])
            weights.append(solved[:SAFE, : probe.columns])
    return torch.cat(logits), torch.cat(weights)


def _ties(
    probe: Probe, rule: RoutingRule, tokens: torch.Tensor, generator: torch.Generator
) -> Iterator[RoutingRule]:
    """The rule with each order among equals that gives the module's weights on tied logits."""
    tied = ties(probe.columns, _ROWS, generator)
    eager = probe.solve(tokens, tied)[0][:SAFE, : probe.columns]
    alike = False
    for order in ("topk", "first"):
        ordered = replace(rule, ties=order)
        description = replace(probe.description, routing=ordered)
        ruled = choices(probe.module, description, tied).dense()[:SAFE]
        if are_close(ruled, eager, 1e-3):
            alike = True
            yield ordered
    if not alike:
        raise NoMatch("on tied logits it chooses neither as torch.topk nor the first of equals")
