"""Inputs of the model are bound to constants, and values that depend on these alone are folded.

    graph main(x, task; gates[8, E, D], w1[E, H, D], …)   graph main(x; w1_3[H, D], …)
      g = aten.index_select(gates, task)                    h = aten.linear(x, w1_3)
      logits = aten.linear(t, g)                            a = aten.silu(h)
      w, ids = moe.route(logits)                      ->    y = aten.linear(a, w2_3)
      … = moe.dispatch(x, ids)
      y = moe.combine(moe.experts(…), …, w)

If every token then chooses the same experts of a layer, the layer becomes the weighted sum of these
experts as dense layers. If a router adds minus infinity to some columns (for experts of other
languages), these columns and their experts are removed. Exact up to the rounding of products whose
rows are in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

from moec.errors import NoMatch, UsageError
from moec.ir.graph import Op, Program, Stage
from moec.ir.stats import stored_bytes
from moec.passes.core.moe_layer import layer_of, name_of
from moec.passes.core.options import Given, show_given
from moec.passes.core.runner import Log, Pass
from moec.passes.specialise.bind_inputs import bind, seeds
from moec.passes.specialise.fold_known import fold_known
from moec.passes.specialise.static_routing import (
    Constants,
    densify,
    reachable_experts,
    restrict_experts,
)
from moec.passes.specialise.token_invariant import TokenInvariantAnalysis


@dataclass(frozen=True)
class Specialise(Pass):
    """Bind inputs to constants: fold values that depend on these alone, drop unreachable
    experts."""

    inputs: Given = field(
        default_factory=dict, metadata={"says": "an input of the model and its constant value"}
    )
    name: ClassVar[str] = "specialise"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE
    source: ClassVar[str] = (
        "a task: arXiv 2306.17165, 2212.08066; a language: arXiv 2410.10626; a timestep: "
        "arXiv 2305.18295"
    )

    @property
    def binds(self) -> Given:
        return self.inputs

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping) or not self.inputs:
            raise UsageError("specialise: name an input of the model and its constant value")

    def run(self, program: Program, log: Log) -> Program:
        """Raises UsageError for an input that the model lacks, or that cannot have that value."""
        before = stored_bytes(program)
        program = bind(program, self.inputs, self.name)
        constants = TokenInvariantAnalysis(program, seeds(program)).constants
        program = fold_known(program, constants, log)
        for experts in [op for op in program.graph.ops if op.name == "moe.experts"]:
            try:
                program = _restrict_layer(program, experts, constants, log)
            except NoMatch as why:
                log.decline(name_of(experts), str(why))
        bound = ", ".join(f"{name}={value}" for name, value in show_given(self.inputs).items())
        log.says.append(f"{bound}: {before - stored_bytes(program):,} bytes of weights fewer")
        return program


def _restrict_layer(program: Program, experts: Op, constants: Constants, log: Log) -> Program:
    """The program with the layer restricted to the experts that some token can choose."""
    where = name_of(experts)
    dispatch = program.graph.producers[experts.inputs[1]]
    count = cast(int, dispatch.attrs["num_experts"])
    if dispatch.inputs[1] in constants:
        chosen = [int(expert) for expert in constants[dispatch.inputs[1]][0]]
        narrowed = densify(program, experts, chosen, constants)
        listed = ", ".join(map(str, chosen))
        says = f"{where}: every token takes {listed} of {count} experts: dense"
    else:
        layer = layer_of(program.graph, experts)
        ids = reachable_experts(program, layer, constants)
        if layer.route.outputs[1] in constants:
            raise NoMatch("every token takes the same experts, and a capacity drops some of them")
        if len(ids) == count:
            raise NoMatch("every expert can still be chosen with the inputs that were bound")
        narrowed = restrict_experts(program, layer, ids)
        says = f"{where}: {', '.join(map(str, ids))} of {count} experts can be chosen"
    if not log.spend(says):
        return program
    log.says.append(says)
    return narrowed
