"""A few layers of the fuzzer, and bugs that it must find. `python -m tests.fuzz` generates any
number of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.capture.guards.settle import Settled
from moec.errors import IRError
from moec.ir.graph import Program
from moec.passes.core.runner import Log
from moec.passes.lower.fuse_dispatch import FuseDispatch
from moec.passes.lower.fuse_gate import FuseGate
from moec.passes.proof.prove import Prover
from tests.fuzz.judge import Outcome, _difference, judge
from tests.fuzz.layer import Layer, draw, source

PLAIN = Layer(
    gate="linear",
    router="renormalised",
    mask="",
    around="",
    limit="",
    order="tokens",
    drop="times",
    dispatch="share",
    expert="relu",
    shared="none",
    outputs="tensor",
    flat="view",
    numbers="literals",
    dtype="float32",
    experts=4,
    top_k=2,
    width=16,
    hidden=12,
)


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_a_layer_is_equal_or_refused(number: int, tmp_path: Path) -> None:
    """Those of the first that take seconds."""
    layer = draw(1, number)
    verdict = judge(layer, f"layer_{number}", tmp_path)
    fine = (Outcome.BLOCKS, Outcome.DENSE, Outcome.REFUSED)
    assert verdict.outcome in fine, f"{layer}\n{verdict.words}"


def test_a_layer_is_built(tmp_path: Path) -> None:
    layer = replace(PLAIN, router="sigmoid", dispatch="where", shared="gated", expert="packed")
    assert judge(layer, "built_layer", tmp_path, built=True).outcome is Outcome.BLOCKS


def test_a_layer_is_the_same_for_its_number() -> None:
    assert draw(3, 5) == draw(3, 5)
    assert len({source(draw(3, number)) for number in range(50)}) == 50


def test_what_does_not_run_in_eager_is_no_outcome_of_moec(tmp_path: Path) -> None:
    layer = replace(PLAIN, router="top-p", limit="int")
    broken = replace(layer, dispatch="batched")  # its experts have no such method
    assert judge(broken, "broken_layer", tmp_path).outcome is Outcome.EAGER


def test_rows_alike_near_a_tie_may_decide_as_in_32_bits() -> None:
    """Rows of padding decide together, so that one tie is many rows."""
    eager = torch.ones(60, 4, dtype=torch.bfloat16)
    other = torch.cat([torch.zeros(40, 4), torch.ones(20, 4)])
    ours = other.to(torch.bfloat16)
    assert not _difference(ours, [eager, eager, other], "bfloat16")
    assert "40 of 60 rows" in _difference(ours, [eager, eager], "bfloat16")
    assert "is torch.bfloat16" in _difference(ours, [other, other], "bfloat16")


def test_a_proof_that_accepts_all_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prover, "prove", lambda *args, **options: None)
    verdict = judge(replace(PLAIN, router="threshold"), "unproved", tmp_path)
    assert verdict.outcome is Outcome.WRONG
    assert "differs by" in verdict.words


def test_a_guard_that_is_dropped_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = replace(PLAIN, limit="many", drop="where", top_k=1, router="maximum")
    monkeypatch.setattr(
        "moec.capture.sides.search.settled",
        lambda name, program, *rest: Settled(program.graph.bounds, ()),
    )
    assert judge(layer, "unguarded", tmp_path).outcome is Outcome.WRONG


def test_a_lowering_that_forgets_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FuseGate.run

    def forget(self: FuseGate, program: Program, log: Log) -> Program:
        graph = run(self, program, log).graph
        ops = (
            replace(op, attrs={k: v for k, v in op.attrs.items() if k != "renormalize"})
            for op in graph.ops
        )
        return Program(replace(graph, ops=tuple(ops)), program.weights)

    monkeypatch.setattr(FuseGate, "run", forget)
    assert judge(PLAIN, "forgetful", tmp_path).outcome is Outcome.WRONG


@pytest.mark.parametrize("error", [KeyError("rows"), IRError("not like it")])
def test_an_error_that_is_no_refusal_is_found(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FuseDispatch, program: Program, log: Log) -> Program:
        raise error

    monkeypatch.setattr(FuseDispatch, "run", fail)
    verdict = judge(PLAIN, "failing", tmp_path)
    assert verdict.outcome is Outcome.CRASH
    assert type(error).__name__ in verdict.words
