"""Completes a user's hints with facts that the module itself shows, and proves the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn

from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.description import (
    Added,
    Capacity,
    Description,
    FeedForward,
    Router,
    RoutingRule,
)
from moec.capture.behaviour.layer.field_kinds import check_fields
from moec.capture.behaviour.layer.parts import shaken, tensor
from moec.capture.behaviour.layer.rules import SCORES
from moec.capture.behaviour.proof.probe import Probe, affordable_lengths
from moec.capture.behaviour.proof.proof import Proof, prove
from moec.errors import MoecError, NoMatch, UsageError


@dataclass(frozen=True)
class Hints:
    """Names of parts of the module.

    `experts` is a list of submodules, or the stacked parameters that `body` reads; `router` is a
    submodule, several to apply in order, or a parameter; `shared` are submodules that are added,
    each with the submodule that gates it, or "". The order of ties in `rule` is ignored: both are
    tried.
    """

    experts: tuple[str, ...]
    router: tuple[str, ...]
    rule: RoutingRule
    source: tuple[str, ...] = ()
    body: FeedForward | None = None
    weighs: str = "output"
    capacity: Capacity | None = None
    shared: tuple[tuple[str, str], ...] = ()


def as_hints(
    *,
    router: str | Sequence[str],
    experts: str | Sequence[str],
    top_k: int,
    score: str = "softmax",
    body: Mapping[str, Any] | None = None,
    source: str | Sequence[str] = (),
    weighs: str = "output",
    capacity: Mapping[str, Any] | None = None,
    shared: str | Sequence[str] | Mapping[str, str] = (),
    **rule: Any,
) -> Hints:
    """The hints for the arguments of `moec.describe`. Raises UsageError for a field or a value that
    does not exist."""
    check_fields(
        {
            "router": router, "experts": experts, "top_k": top_k, "body": body, "source": source,
            "capacity": capacity, "shared": shared, **rule, **_entries(body), **_entries(capacity),
        }
    )  # fmt: skip
    if not isinstance(score, str) or score not in SCORES:
        raise UsageError(f"score={score!r} is not one of {', '.join(SCORES)}")
    if weighs not in ("output", "input"):
        raise UsageError(f"weighs={weighs!r} is neither 'output' nor 'input'")
    gates = shared if isinstance(shared, Mapping) else dict.fromkeys(_names(shared), "")
    return Hints(
        experts=_names(experts),
        router=_names(router),
        rule=_filled(RoutingRule, {"score": score, "top_k": top_k} | _tuples(rule)),
        source=_names(source),
        body=None if body is None else _filled(FeedForward, _tuples(body)),
        weighs=weighs,
        capacity=None if capacity is None else _filled(Capacity, _fractions(capacity)),
        shared=tuple(gates.items()),
    )


def _entries(part: Any) -> Mapping[str, Any]:
    return part if isinstance(part, Mapping) else {}


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _fractions(values: Mapping[str, Any]) -> dict[str, Any]:
    """A factor is exact as it is written: 1.1 is 11/10."""
    exact = {"factor": Fraction(str(values["factor"]))} if "factor" in values else {}
    return {**values, **exact}


def _filled(kind: type[Any], values: Mapping[str, Any]) -> Any:
    fields = kind.__dataclass_fields__
    for name in values:
        if name not in fields:
            raise UsageError(f"{name!r} is no part of a description; there are {', '.join(fields)}")
    return kind(**values)


def describe_by_hints(module: nn.Module, arguments: Arguments, hints: Hints) -> Proof:
    """The proved description. Raises NoMatch, with the input, where it is wrong, and UsageError for
    names that the module does not have."""
    _check_names(module, hints)
    probe = Probe(shaken(module), arguments)
    probe.longest, probe.farthest = affordable_lengths(probe)
    experts = _experts(module, hints)
    router, probe.weight_name, probe.columns = _router(probe.module, hints)
    added = tuple(Added((name,), (gate,) if gate else ()) for name, gate in hints.shared)
    description = Description(
        experts=experts,
        body=hints.body,
        source=hints.source,
        router=router,
        weighs=hints.weighs,
        added=added,
        capacity=hints.capacity,
    )
    reasons = []
    for order in ("topk", "first"):
        rule = replace(hints.rule, ties=order)
        if rule.top_k > probe.columns:
            raise NoMatch(f"top_k={rule.top_k} of {probe.columns} columns")
        try:
            return prove(module, probe, replace(description, routing=rule))
        except NoMatch as why:
            reasons.append(str(why))
        except MoecError:
            raise
        except Exception as error:  # of parts of the user's that do not fit, whatever its kind
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NoMatch(f"the description cannot be computed: {first}") from error
    raise NoMatch(reasons[-1] if "tied" in reasons[0] else reasons[0])


def _check_names(module: nn.Module, hints: Hints) -> None:
    """Raises UsageError for a name, other than that of the last part of the router or of experts,
    that the module does not have."""
    modules = {name for name, _ in module.named_modules(remove_duplicate=False)}
    paths = [("router", name) for name in hints.router[:-1]]
    paths += [("source", name) for name in hints.source]
    paths += [("shared", name) for term in hints.shared for name in term if name]
    for field, name in paths:
        if name not in modules:
            raise UsageError(f"{field}={name!r}: {type(module).__name__} has no such submodule")
    if correction := hints.rule.correction:
        try:
            tensor(module, correction)
        except (AttributeError, AssertionError):
            raise UsageError(
                f"correction={correction!r}: {type(module).__name__} has no such tensor"
            ) from None


def _experts(module: nn.Module, hints: Hints) -> tuple[str, ...]:
    if hints.body is not None or len(hints.experts) > 1:
        return hints.experts
    (name,) = hints.experts
    try:
        members = [f"{name}.{child}" for child, _ in module.get_submodule(name).named_children()]
    except AttributeError:
        raise UsageError(f"experts={name!r}: {type(module).__name__} has no such part") from None
    if not members:
        raise UsageError(f"experts={name!r} has no submodules: give a list, or name its body")
    return tuple(members)


def _router(module: nn.Module, hints: Hints) -> tuple[Router, str, int]:
    """The router, the name of the weight by which it is steered, and its number of columns."""
    last = hints.router[-1]
    parameters = dict(module.named_parameters())
    if last in parameters:
        weight = parameters[last]
        return Router(hints.router[:-1], last), last, min(weight.shape)
    try:
        part = module.get_submodule(last)
    except AttributeError:
        raise UsageError(f"router={last!r}: {type(module).__name__} has no such part") from None
    weights = [f"{last}.{n}" for n, p in part.named_parameters() if p.dim() == 2]
    if not weights:
        raise UsageError(f"router={last!r} has no weight [C, D] by which it can be steered")
    columns = tensor(module, weights[-1]).shape[0]
    return Router(hints.router), weights[-1], columns
