"""Bisection finds the wrong rewrite: pass, rule, op, and the error before and after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from moec.capture import capture
from moec.errors import InputError, UsageError
from moec.ir.graph import Op, Program, Stage, Value
from moec.ir.text import parse
from moec.passes.approximate.prune_experts import PruneExperts
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass
from moec.pipeline import choose, exact
from moec.verify.bisect import bisect, drawn_cases
from tests.capture.modules import Function

CHAIN = 9


def program(dtype: str = "f32") -> Program:
    """y = relu(relu(... (x @ w)))"""
    lines = "".join(
        f"  v{i + 1}: {dtype}[T, 4] = aten.relu.default(v{i}) @ layers.{i}\n" for i in range(CHAIN)
    )
    graph = parse(
        f"graph main(x: {dtype}[T, 4]; w: {dtype}[4, 4]) {{\n"
        f"  v0: {dtype}[T, 4] = aten.linear.default(x, w)\n{lines}  return v{CHAIN}\n}}"
    )
    from moec.ir.aten import TORCH_DTYPES

    return Program(graph, {"w": torch.eye(4, dtype=TORCH_DTYPES[dtype])})


@dataclass(frozen=True)
class Swap(Pass):
    """Every relu becomes `right`, but the one at `at` becomes `wrong`."""

    title: str
    right: str = "aten.relu.default"
    wrong: str = "aten.neg.default"
    at: int = -1
    counted: bool = True
    takes: ClassVar[Stage] = Stage.ATEN
    gives: ClassVar[Stage] = Stage.ATEN

    @property
    def name(self) -> str:
        return self.title

    def run(self, program: Program, log: Log) -> Program:
        def rule(op: Op, builder: Builder) -> tuple[Value, ...] | None:
            if op.name != "aten.relu.default":
                return None
            name = self.wrong if op.origin == f"layers.{self.at}" else self.right
            return builder.emit(name, op.inputs, [op.outputs[0].type], like=op)

        private = log if self.counted else Log()
        return replace(program, graph=rewrite(program.graph, rule, private))


INPUTS = [[torch.linspace(0.1, 1, 8).reshape(2, 4)]]


@pytest.mark.parametrize("at", range(CHAIN))
def test_finds_the_rewrite(at: int) -> None:
    passes = [Swap("clean"), Swap("broken", at=at), Swap("later", at=0)]
    culprit = bisect(program(), passes, INPUTS).culprit
    assert culprit is not None
    assert (culprit.pass_name, culprit.rewrite, culprit.of) == ("broken", at + 1, CHAIN)
    assert f"@ layers.{at}" in culprit.what
    assert culprit.before == 0.0
    assert culprit.after > 0.5


def test_says_what_it_found(golden: Callable[[str], None]) -> None:
    golden(str(bisect(program(), [Swap("clean"), Swap("broken", at=3)], INPUTS)))


def test_nothing_to_find() -> None:
    bisection = bisect(program(), [Swap("one"), Swap("two")], INPUTS)
    assert bisection.culprit is None
    assert str(bisection) == (
        f"{2 * CHAIN} rewrites in 2 passes, and none changes the numbers: the greatest error is "
        "0.0e+00, allowed up to 2e-04"
    )


def test_a_pass_that_does_not_count_its_rewrites_is_named_as_a_whole() -> None:
    bisection = bisect(program(), [Swap("broken", at=3, counted=False)], INPUTS)
    assert bisection.culprit is not None
    assert "the pass as a whole" in str(bisection)


def test_tolerance_decides() -> None:
    close = [Swap("close", wrong="aten.sin.default", at=4)]
    assert bisect(program(), close, INPUTS).culprit is not None
    assert bisect(program(), close, INPUTS, tolerance=0.5).culprit is None


def test_rounding_is_no_culprit() -> None:
    inputs = [[INPUTS[0][0].bfloat16()]]
    assert bisect(program("bf16"), [Swap("clean")], inputs).culprit is None
    assert bisect(program("bf16"), [Swap("broken", at=2)], inputs).culprit is not None


def test_the_inputs_are_those_that_the_module_accepts() -> None:
    def once(ids: torch.Tensor) -> torch.Tensor:
        assert int(ids.max()) < 5
        return table(ids)

    table = torch.nn.Embedding(11, 4)
    captured = capture(Function(table), (torch.zeros(50, 9, dtype=torch.int64),))
    captured = replace(captured, eager=lambda ids: (once(ids),))
    (example,) = drawn_cases(captured, 0)
    assert torch.equal(example[0], torch.zeros(50, 9, dtype=torch.int64))
    with pytest.raises(InputError, match="without example inputs"):
        drawn_cases(replace(captured, example=()), 0)


def test_passes_that_change_the_model_are_not_looked_at() -> None:
    assert exact(choose(1), "") == choose(1)
    with pytest.raises(UsageError, match="prune-experts changes what the model computes: no"):
        exact(choose(1, [PruneExperts()]), "no")
