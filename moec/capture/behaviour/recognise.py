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

from moec.capture.behaviour.expert_body import expert_body
from moec.capture.behaviour.inference.cases import BehaviourCase
from moec.capture.behaviour.inference.constants import SAFE, find_added, find_no_network
from moec.capture.behaviour.inference.draws import all_on, draws, ties
from moec.capture.behaviour.inference.drops import find_capacity
from moec.capture.behaviour.inference.fit import fit
from moec.capture.behaviour.inference.probe import Probe, affordable_lengths
from moec.capture.behaviour.inference.sources import find_experts, find_router
from moec.capture.behaviour.inference.thresholds import narrowed
from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.description import Description, Router, RoutingRule
from moec.capture.behaviour.layer.feed_forward import feed_forwards
from moec.capture.behaviour.layer.parts import expert_groups, shaken, stacked_groups
from moec.capture.behaviour.layer.rules import SCORES
from moec.capture.behaviour.proof.proof import Differs, Proof, prove
from moec.capture.behaviour.replacement import Replacement, choices
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
    if next(_groups(probe), None) is None:
        raise NoExperts("it has no group of like parts that may be experts")
    probe.module = shaken(module)
    probe.longest, probe.farthest = affordable_lengths(probe)
    _check_repeats(probe)
    reasons: list[tuple[int, str]] = [(0, "nothing of it looks like experts")]
    suspect: BehaviourCase | None = None
    for names, stacks in _groups(probe):
        try:
            for description in _descriptions(probe, names, stacks):
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
    inputs = probe.inputs(2, 12)
    first, second = probe.run(inputs).leaves, probe.run(inputs).leaves
    for (_, a), (_, b) in zip(first, second, strict=True):
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            raise NoMatch("two runs on one input differ: it draws random numbers or keeps a state")
    for name, value in probe.module.state_dict().items():
        if not torch.equal(value, before[name]):
            raise NoMatch(f"a run changes {name}: it keeps a state")


def _groups(probe: Probe) -> Iterator[tuple[tuple[str, ...], dict[str, torch.Tensor]]]:
    for names in expert_groups(probe.module, probe.width):
        yield names, {}
    for stacks in stacked_groups(probe.module):
        yield (), stacks


def _descriptions(
    probe: Probe, names: tuple[str, ...], stacks: Mapping[str, torch.Tensor]
) -> Iterator[Description]:
    """Descriptions that the experiments suggest, the likeliest first."""
    probe.description, probe.weight_name, probe.constants = Description(experts=names), "", []
    count = len(names) or len(next(iter(stacks.values())))
    if probe.arguments.ids is not None:
        if not names:
            raise NoMatch("its choice is an input, and its experts are no submodules")
        yield Description("given", names)
        return
    yield from _two_levels(probe, names, count)
    yield from _soft_slots(probe, stacks, count)
    why = (
        f"{count} like parts, but no product with {count} or a few more columns, a row for each "
        "token, chooses among them"
    )
    for name, weight in _tensors(probe, names).items():
        if weight.dim() != 2:
            continue
        for columns in dict.fromkeys(c for c in weight.shape if count <= c <= count + 8):
            probe.description, probe.weight_name = Description(experts=names), name
            probe.columns = columns
            observed = probe.run(probe.inputs(2, 12)).logits
            if observed is None or observed.numel() != 24 * columns:
                continue
            try:
                yield from _routed(probe, stacks, count)
            except NoMatch as reason:
                why = str(reason)
    raise NoMatch(why)


def _tensors(probe: Probe, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Parameters and buffers that do not belong to experts."""
    every = {**dict(probe.module.named_parameters()), **dict(probe.module.named_buffers())}
    inside = tuple(f"{name}." for name in names)
    return {n: t for n, t in every.items() if not (inside and n.startswith(inside))}


def _two_levels(probe: Probe, names: tuple[str, ...], count: int) -> Iterator[Description]:
    linear = {n: m for n, m in probe.module.named_modules() if isinstance(m, nn.Linear)}
    linear = {n: m for n, m in linear.items() if n not in names}
    for outer in linear if names else ():
        inner = [n for n in linear if n != outer]
        widths = [linear[n].out_features for n in inner]
        if len(inner) == linear[outer].out_features and sum(widths) == count:
            yield Description(
                "two levels", names, router=Router((outer,)), inner_routers=tuple(inner)
            )


def _soft_slots(
    probe: Probe, stacks: Mapping[str, torch.Tensor], count: int
) -> Iterator[Description]:
    if not stacks or len(probe.arguments.shape) != 3:
        return
    for name, weight in _tensors(probe, ()).items():
        if weight.dim() != 3 or weight.shape[:2] != (probe.width, count):
            continue
        for body, names in feed_forwards(stacks, probe.width):
            router = Router(weight=name)
            description = Description("soft slots", names, body, router=router)
            if _agrees(probe, description):
                yield description


def _agrees(
    probe: Probe, description: Description, logits: torch.Tensor | None = None, body: str = ""
) -> bool:
    inputs = probe.inputs(2, 12) if logits is None else probe.inputs(1, len(logits))
    eager = probe.run(inputs, logits).hidden
    block = Replacement(probe.module, description, probe.width, body)
    with torch.no_grad(), probe.steered(logits):
        return are_close(block(*inputs)["hidden"].reshape(eager.shape), eager)


def _routed(probe: Probe, stacks: Mapping[str, torch.Tensor], count: int) -> Iterator[Description]:
    """Descriptions of a module whose logits are a product with `probe.weight_name`."""
    columns, generator = probe.columns, torch.Generator().manual_seed(5)
    inputs, kinds = probe.inputs(1, _ROWS), draws(columns, _ROWS, generator)
    _check_steers(probe, inputs, kinds)
    calls = probe.watch(inputs)
    observed = probe.run(inputs).logits
    if observed is None:
        raise NoMatch(f"some runs do not multiply with {probe.weight_name}: one expert is drawn")
    probe.constants = _constants(probe, count)
    find_experts(probe, calls, stacks, inputs, kinds["one"], kinds["usual"])
    flat = inputs[0].reshape(-1, probe.width)
    router = find_router(probe, observed.reshape(-1, columns), flat)
    probe.description = replace(probe.description, router=router)
    corrections = _corrections(probe, router)
    probe.watch(inputs, all_on(0, _ROWS, columns))
    added = () if probe.description.log_sum_exp else find_added(probe, inputs, count)
    probe.description = replace(probe.description, added=added)
    if probe.description.weighs == "input":
        yield from _input_side(probe, kinds)
        return
    _check_alone(probe, inputs, kinds["usual"], count)
    logits, solved = _solved(probe, inputs, count, generator)
    for fitted in itertools.islice(fit(logits, solved, columns, corrections), _MOST_RULES):
        rule = fitted.rule
        if fitted.interval:
            rule = narrowed(probe, rule, fitted.interval, logits, inputs, count)
        no_network = find_no_network(probe, rule, inputs, count, added)
        capacity = find_capacity(probe, count)
        complete = replace(probe.description, no_network=no_network, capacity=capacity)
        for tied in _ties(probe, rule, inputs, count, generator):
            yield replace(complete, routing=tied)


def _check_steers(
    probe: Probe, inputs: tuple[torch.Tensor, ...], kinds: Mapping[str, torch.Tensor]
) -> None:
    """Checks that logits matter, and that with fixed routing no token changes another's output."""
    moved = (inputs[0].clone(),)
    moved[0].view(-1, probe.width)[-1] += 1
    one, usual = probe.run(inputs, kinds["one"]).hidden, probe.run(inputs, kinds["usual"]).hidden
    if are_close(one, usual):
        raise NoMatch(f"other logits than those of {probe.weight_name} change nothing")
    if not are_close(usual[:-1], probe.run(moved, kinds["usual"]).hidden[:-1]):
        raise NoMatch(
            "with the routing held, one token changes another's output: tokens meet inside it, "
            "as in attention"
        )


def _check_alone(
    probe: Probe, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor, count: int
) -> None:
    """Checks that the choices of the first tokens do not depend on the logits of later tokens."""
    later = torch.cat([logits[:SAFE], logits[SAFE:].roll(1, 1) * 3])
    first, second = (probe.solve(inputs, z)[0][:SAFE, :count] for z in (logits, later))
    if not are_close(first, second, 1e-3):
        raise NoMatch(
            "a token's weights depend on the logits of later tokens, as where experts choose "
            "their tokens or the best tokens are served first"
        )


def _constants(probe: Probe, count: int) -> list[tuple[str, torch.Tensor]]:
    """Tensors [n, D] whose rows may be the results of router columns beyond the experts."""
    if probe.columns <= count:
        return []
    return [
        (name, t.detach()[None])
        for name, t in _tensors(probe, probe.description.experts).items()
        if t.dim() == 2 and t.shape[1] == probe.width and name != probe.weight_name
    ]


def _corrections(probe: Probe, router: Router) -> dict[str, torch.Tensor]:
    biases = {f"{n}.bias" for n, m in probe.module.named_modules() if isinstance(m, nn.Linear)}
    return {
        name: t
        for name, t in _tensors(probe, probe.description.experts).items()
        if t.shape == (probe.columns,) and name not in biases and name != router.bias
    }


def _input_side(probe: Probe, kinds: Mapping[str, torch.Tensor]) -> Iterator[Description]:
    """Rules whose weights scale what experts read. Each is tried as a whole, because weights cannot
    be solved for."""
    rules = itertools.product(
        range(1, probe.columns + 1), SCORES, (False, True), ("score", "logits")
    )
    body = expert_body(probe.module, probe.description, probe.width)
    for k, score, renormalise, by in rules:
        rule = RoutingRule(score, k, renormalise, ranked_by=by)
        description = replace(probe.description, routing=rule)
        steered = (kinds[kind] for kind in ("usual", "wide", "flat", "extreme"))
        if all(_agrees(probe, description, logits, body) for logits in steered):
            yield description
            yield replace(description, routing=replace(rule, ties="first"))
    raise NoMatch("its experts read scaled rows, and no rule of the logits gives the scales")


def _solved(
    probe: Probe, inputs: tuple[torch.Tensor, ...], count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every kind, and the weights [T, E] that the module gives its experts for them."""
    logits, weights = [], []
    for _ in range(10):
        for drawn in draws(probe.columns, _ROWS, generator).values():
            solved, _ = probe.solve(inputs, drawn)
            logits.append(drawn[:SAFE])
            weights.append(solved[:SAFE, :count])
    return torch.cat(logits), torch.cat(weights)


def _ties(
    probe: Probe,
    rule: RoutingRule,
    inputs: tuple[torch.Tensor, ...],
    count: int,
    generator: torch.Generator,
) -> Iterator[RoutingRule]:
    """The rule with each order among equals that gives the module's weights on tied logits."""
    tied = ties(probe.columns, _ROWS, generator)
    eager = probe.solve(inputs, tied)[0][:SAFE, :count]
    alike = False
    for order in ("topk", "first"):
        ordered = replace(rule, ties=order)
        description = replace(probe.description, routing=ordered)
        ruled = choices(probe.module, description, tied).dense()[:SAFE, :count]
        if are_close(ruled, eager, 1e-3):
            alike = True
            yield ordered
    if not alike:
        raise NoMatch("on tied logits it chooses neither as torch.topk nor the first of equals")
