"""A few layers of the fuzzer, and bugs that it must find. `python -m tests.fuzz` generates any
number of layers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from moec.capture import capture
from moec.capture.sizes.settle import Settled
from moec.errors import InputError, IRError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.run_in_float32 import InFloat32
from moec.passes.core.runner import Log
from moec.passes.lower.fuse_dispatch import FuseDispatch
from moec.passes.lower.fuse_gate import FuseGate
from moec.passes.proof.prove import Prover
from tests.capture.modules import Function
from tests.fuzz import branches, rewrites
from tests.fuzz.judge import (
    DRAWS,
    EXAMPLE,
    SIZES,
    Answer,
    Outcome,
    compare,
    judge,
    load,
)
from tests.fuzz.judge import calls as calls_of
from tests.fuzz.judge import draw as draw_inputs
from tests.fuzz.layer import Layer, draw, source
from tests.fuzz.second_inputs import SECOND_INPUTS

PLAIN = Layer(
    gate="linear",
    router="renormalised",
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


@pytest.mark.parametrize("kind", SECOND_INPUTS)
@pytest.mark.parametrize("condition", ["", "x.shape[1] > 6"])
def test_a_second_input_decides(kind: str, condition: str, tmp_path: Path) -> None:
    """Each use has values with other results than the example's: a compiler that takes the
    example's for a constant is found. On a condition they are equal at the sizes without it."""
    second = SECOND_INPUTS[kind]
    usual, *others = second.values
    part = branches.SECOND if condition else ""
    for number, use in enumerate(name for name in second.uses if name != "unused"):
        layer = replace(PLAIN, second=kind, use=use, example=usual, condition=condition, part=part)
        layer = replace(layer, flat=("view", "transposed")[number % 2], dtype="float64")
        module = load(layer, f"{kind.replace(' ', '_')}_{len(condition)}_{number}", tmp_path)

        def differ(size: tuple[int, int], module: nn.Module = module, layer: Layer = layer) -> bool:
            with torch.no_grad():
                x, first = draw_inputs("normal", usual, size, layer)
                drawn = (draw_inputs("normal", value, size, layer)[1] for value in others)
                return any(not torch.equal(module(x, first), module(x, value)) for value in drawn)

        assert differ((3, 7)), use
        if condition and not second.use(use).pools:
            assert not differ((3, 6)), use


def test_draws_have_all_values_at_every_size() -> None:
    layer = replace(PLAIN, second="keep", use="weights", example="random")
    calls = list(calls_of(layer))
    assert calls[0] == ("normal", "random", EXAMPLE)
    for size in SIZES:
        assert {v for _, v, s in calls if s == size} == set(SECOND_INPUTS["keep"].values)
        assert {d for d, _, s in calls if s == size} == set(DRAWS)
    drawn = {(d, v) for d, v, _ in calls}
    assert len(drawn) == len(DRAWS) * len(SECOND_INPUTS["keep"].values)


def test_layers_have_second_inputs_and_branches() -> None:
    layers = [draw(5, number) for number in range(400)]
    assert {layer.second for layer in layers} == {"", *SECOND_INPUTS}
    assert 160 < sum(bool(layer.second) for layer in layers) < 240
    parts = {*branches.PARTS, branches.SECOND, branches.SHARED, branches.DISPATCH}
    assert {layer.part for layer in layers} == {"", *parts}
    for layer in layers:
        text = source(layer)
        assert not layer.condition or f"if {layer.condition}" in text, layer
        compile(text, "layer", "exec")


def test_what_does_not_run_in_eager_is_no_outcome_of_moec(tmp_path: Path) -> None:
    layer = replace(PLAIN, router="top-p", limit="int")
    broken = replace(layer, dispatch="batched")  # its experts have no such method
    assert judge(broken, "broken_layer", tmp_path).outcome is Outcome.EAGER


def test_rows_alike_near_a_tie_may_decide_as_in_32_bits() -> None:
    """Rows of padding decide together."""
    x, exact = torch.ones(60, 4, dtype=torch.bfloat16), torch.ones(60, 4)
    eager = torch.cat([torch.zeros(40, 4), torch.ones(20, 4)]).bfloat16()
    tie = Answer("tie", (x,), eager, lambda *_: exact)
    assert compare(lambda x: x, [tie], "bfloat16") == ([], [])
    (wrong,), _ = compare(lambda x: eager, [replace(tie, eager=x)], "bfloat16")
    assert "40 of 60 rows" in wrong
    (wrong,), _ = compare(lambda x: x.float(), [tie], "bfloat16")
    assert "is torch.float32" in wrong


def test_constants_in_16_bits_excuse_no_more_than_they_cause() -> None:
    """A normed weight that a pass rounds to 16 bits moves all results, and may flip a choice."""
    x, exact = torch.ones(40, 4), torch.linspace(1, 2, 160).reshape(40, 4)
    answers = [Answer("rounded", (x,), exact, lambda *_: exact)]
    rounded = exact * (1 + 2.0**-9)
    assert compare(lambda _: rounded, answers, "float32", lambda _: rounded) == ([], [])
    (wrong,), _ = compare(lambda _: exact * 1.02, answers, "float32", lambda _: rounded)
    assert "differs by 2.0e-02" in wrong
    (wrong,), _ = compare(lambda _: rounded, answers, "float32", lambda _: exact)
    assert "differs by" in wrong
    (wrong,), _ = compare(lambda _: rounded.half(), answers, "float32", lambda _: rounded)
    assert "is torch.float16" in wrong


def test_the_first_of_equal_scores_may_drop_other_rows_in_16_bits() -> None:
    """Eager in its own bits decides which of two equal experts, and which rows are dropped."""
    x, exact = torch.ones(60, 4, dtype=torch.bfloat16), torch.ones(60, 4)
    first = exact.bfloat16().index_fill(0, torch.tensor([7]), 0.5)

    def eager(widened: bool = False, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
        return exact if widened else first

    tie = Answer("tie", (x,), exact.bfloat16(), eager)
    assert compare(lambda _: first, [tie], "bfloat16") == ([], [])
    for fault in (first.roll(1, 0), 2 * first - 1):
        (wrong,), _ = compare(lambda _, fault=fault: fault, [tie], "bfloat16")
        assert "1 of 60 rows" in wrong


def test_what_a_mean_rounds_may_differ_as_much() -> None:
    """Rows alike without their mean are 0 but for rounding."""
    x = torch.full((30, 4), 1.1)

    def eager(noisy: bool, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
        with InFloat32(noise, seed):
            return x - x.mean(0, keepdim=True)

    answers = [Answer("centred", (x,), eager(False), eager)]
    assert compare(lambda x: x * 4e-7, answers, "float32") == ([], [])
    (wrong,), _ = compare(lambda x: x * 4e-6, answers, "float32")
    assert "differs by" in wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_eagers_last_bits_decide_may_differ_as_much(dtype: torch.dtype) -> None:
    """A row minus itself is 0 but for rounding, whose size says nothing."""
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(0), dtype=dtype) + 1

    def eager(noisy: bool, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
        with InFloat32(noise, seed):
            return x / 3 * 3 - x

    answers = [Answer("cancelled", (x,), eager(False), eager)]
    name = str(dtype).removeprefix("torch.")
    unit = torch.finfo(dtype).eps
    assert compare(lambda x: x * unit, answers, name) == ([], [])
    (wrong,), _ = compare(lambda x: x * unit * 100, answers, name)
    assert "differs by" in wrong


def test_calls_after_a_refused_one_are_compared() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            raise InputError("too few rows")
        return x

    inputs = {size: torch.ones(size, 2) for size in (1, 2, 3)}
    other = torch.full((3, 2), 2.0)
    answers = [
        Answer(f"{n}", (x,), x if n < 3 else x + 1, lambda *_: other) for n, x in inputs.items()
    ]
    wrong, refused = compare(run, answers, "float32")
    assert wrong == ["3: output 0 differs by 5.0e-01"]
    assert refused == ["1: InputError: too few rows"]


def test_the_first_of_equal_scores_counts_where_a_result_is_not_that_of_eager() -> None:
    x = torch.ones(2, 2)
    other = Answer("other", (x,), x + 1, lambda *_: x)
    assert compare(lambda x: x, [other], "float32") == ([], [])
    wrong, _ = compare(lambda x: x, [replace(other, run=lambda *_: x + 2)], "float32")
    assert wrong == ["other: output 0 differs by 5.0e-01"]


def test_a_proof_that_accepts_all_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prover, "prove", lambda *args, **options: None)
    monkeypatch.setattr(rewrites, "REWRITES", {"commuted": rewrites.REWRITES["commuted"]})
    before, form = rewrites.rewritten_layer(replace(PLAIN, router="threshold"), "any", tmp_path)
    assert before is form.outcome is Outcome.WRONG
    assert "commuted: normal 2x6: output 0 differs by" in form.words


BRANCHED = replace(
    PLAIN,
    second="keep",
    use="rows",
    example="all",
    condition="x.shape[0] * x.shape[1] >= 41",
    part=branches.SECOND,
)


@pytest.mark.parametrize(
    "layer",
    [replace(PLAIN, limit="many", drop="where", top_k=1, router="maximum"), BRANCHED],
    ids=["capacity", "branch"],
)
def test_a_guard_that_is_dropped_is_found(
    layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moec.capture.sizes.sides.settled",
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


def mixed(x: torch.Tensor) -> torch.Tensor:
    scores, ids = x.softmax(-1), x.argsort(-1)[:, :2]
    share = scores.gather(-1, ids) / (scores.sum() - x.abs().amax(-1, keepdim=True) + 9)
    rows = torch.bmm(x.expand(3, *x.shape), x.new_ones(3, 6, 4)).sum(0).view(-1, 2, 2)
    y = functional.linear(functional.silu(x), x.new_ones(5, 6), x.new_ones(5)) * share[:, :1]
    return torch.cat([share, rows.flatten(1), y], 1)


@pytest.mark.parametrize("name", rewrites.REWRITES)
def test_a_rewrite_gives_an_equal_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 6)
    monkeypatch.setattr(rewrites, "REWRITES", {name: rewrites.REWRITES[name]})
    program = capture(Function(mixed), (x,)).program
    names = list[str]()
    graph = rewrites.rewritten(names, random.Random(0), program.graph)
    assert names == [name]
    (result,) = evaluate(graph, (x,), program.weights)
    torch.testing.assert_close(result, mixed(x), rtol=1e-4, atol=1e-5)
