"""A backend: rules for ops that have a kernel, loops for all others, and a library builder.

    op of the graph ── rules in order, the first whose `check` does not refuse ── emit ──▶ a call
                    └─ no rule, or all refuse ──────────────── fusion ── loop ──▶ a group's kernel

A backend is a value: `replace(CPU, rules=(mine, *CPU.rules))` is a backend that tries another
kernel first. `moec.codegen.backends` finds the backend for a target by its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax

from moec.cache import Store
from moec.codegen.module_builder import LoopMaker, Lowering, Maker
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op
from moec.runtime.package import BuiltLibrary


@dataclass(frozen=True)
class Rule:
    """One kernel for the ops with the names `ops`.

    `check` raises NoMatch with the reason if the kernel does not support this op of this graph.
    `emit` returns the op's outputs, from a call of the kernel. `name` appears in reports.
    """

    name: str
    ops: tuple[str, ...]
    check: Callable[[Op, Graph], object]
    emit: Callable[[Lowering, Op], list[relax.Expr]]


@dataclass(frozen=True)
class Refusal:
    """The reasons why an op with rules became a plain loop, one per rule."""

    origin: str
    op: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The rule of each op that has a kernel, and the refusals of ops whose rules all refused."""

    rules: Mapping[Op, Rule]
    refused: Mapping[Op, Refusal]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The refusals, each once."""
        return tuple(dict.fromkeys(self.refused.values()))


@dataclass(frozen=True)
class Backend:
    """Code generation for targets of one `kind`.

    `kernels` maps the type of a spec to the generator of its kernel (`Lowering.kernel`). `loop`
    makes one kernel of a group of ops without a rule. `library` compiles modules of Relax
    functions and kernels, by the name of the target, and links them. `parts` are the targets for
    each of which a target needs a module. `ready` raises TargetError if this machine lacks what
    `library` needs. With `destinations`, functions write results into memory of the caller; with
    `index_checks`, they refuse indices outside of their axis, as eager does. `slots` makes the
    arguments of products whose experts are read from disk, for `Lowering.slots`.
    """

    kind: str
    rules: tuple[Rule, ...]
    kernels: Mapping[type, Maker]
    loop: LoopMaker
    library: Callable[[Mapping[str, IRModule], Any, int, Store | None], BuiltLibrary]
    ready: Callable[[Any], object] = lambda target: None
    parts: Callable[[Any], tuple[Any, ...]] = lambda target: (target,)
    destinations: bool = False
    index_checks: bool = False
    slots: Callable[..., Any] | None = None

    def select(self, graph: Graph) -> Selection:
        """For each op, the first rule in order that does not refuse it."""
        by_name: dict[str, list[Rule]] = {}
        for rule in self.rules:
            for name in rule.ops:
                by_name.setdefault(name, []).append(rule)
        rules: dict[Op, Rule] = {}
        refused: dict[Op, Refusal] = {}
        for op in graph.ops:
            reasons = []
            for rule in by_name.get(op.name, ()):
                try:
                    rule.check(op, graph)
                except NoMatch as why:
                    reasons.append(f"{rule.name}: {why}")
                    continue
                rules[op] = rule
                break
            else:
                if reasons:
                    origin = op.origin or op.outputs[0].name
                    refused[op] = Refusal(origin, op.name, "; ".join(reasons))
        return Selection(rules, refused)


def always(op: Op, graph: Graph) -> None:
    """The check of a rule that accepts every op."""


def require(condition: bool, reason: str) -> None:
    """Raises NoMatch with the reason unless the condition is true."""
    if not condition:
        raise NoMatch(reason)
