"""Ranks that do not compute what the model computes are refused, by draws where the example hides
it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import moec
from moec.capture import Captured
from moec.errors import VerificationError
from moec.ir.graph import Module, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.outputs import flatten
from moec.ir.interpret.ranks import evaluate_ranks
from moec.ir.text import parse, print_graph
from moec.oracle.tolerance import TOLERANCES, distance
from moec.passes.decode import incremental
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.plan.groups import groups_of
from moec.runtime.package import DECODE
from moec.verify.ranks import Ranked, check_ranks, first_step
from tests.models.families import FAMILIES
from tests.parallel.test_generation import plan_for
from tests.passes.parallel.test_plan_parallelism import FORMS, MODEL, D, model, plan

Change = Callable[[Program], Program]


def masked(dtype: str) -> Program:
    """A layer that sets the rows of masked tokens to zero."""
    text = print_graph(MODEL).replace("f32", dtype).replace(f" w: {dtype}[", " w: f32[")
    text = text.replace(f"x: {dtype}[T, {D}];", f"x: {dtype}[T, {D}], off: bool[T, 1];")
    masking = f"  y: {dtype}[T, {D}] = aten.masked_fill.Scalar(z, off) <value=0.0>\n  return y\n}}"
    graph = parse(masking.join(text.rsplit("  return z\n}", 1)))
    weights = model().weights
    return Program(graph, {p.name: weights[p.name].to(DTYPES[dtype]) for p in graph.params})


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def captured(program: Program) -> Captured:
    """Its example masks no token."""
    dtype = DTYPES[program.graph.inputs[0].dtype]
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0)).to(dtype)

    def eager(*case: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return evaluate(program.graph, case, program.weights)

    example = (x, torch.zeros(5, 1, dtype=torch.bool))
    return Captured(program, eager, example, flatten(eager(*example))[1], is_graph=True)


def ignoring_masks(program: Program) -> Program:
    graph, fill = program.graph, program.graph.ops[-1]
    return replace(program, graph=replace(graph, ops=graph.ops[:-1], outputs=fill.inputs[:1]))


def with_a_wrong_expert(program: Program) -> Program:
    """The last product of its first expert is 2 % too large."""
    (experts,) = [op for op in program.graph.ops if op.name == "moe.experts"]
    name = experts.inputs[4].name
    weight = program.weights[name].clone()
    weight[0] *= 1.02
    return replace(program, weights={**program.weights, name: weight})


def ranked(program: Program, form: str = "flat", change: Change | None = None) -> Ranked:
    """The ranks, the second of which may be changed."""
    programs = dict(rank_programs(program, FORMS[form]).programs)
    if change is not None:
        programs["rank.1.main"] = change(programs["rank.1.main"])
    return Ranked(program, Module(programs), FORMS[form])


def error_on_the_example(source: Captured, ranks: Ranked) -> float:
    results = evaluate_ranks(
        ranks.module, [source.example] * ranks.plan.devices, groups_of(ranks.plan)
    )
    return max(distance(result, source.eager(*source.example)[0]) for (result,) in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["flat", "slices", "deduplicated"])
def test_right_ranks(form: str, dtype: str) -> None:
    program = masked(dtype)
    check_ranks(captured(program), ranked(program, form))


def test_a_mask_that_the_example_leaves_empty() -> None:
    program = masked("f32")
    source, ranks = captured(program), ranked(program, change=ignoring_masks)
    assert error_on_the_example(source, ranks) < TOLERANCES["f32"]
    with pytest.raises(VerificationError, match=r"rank 1 computes another z: .* \(5, 1\)"):
        check_ranks(source, ranks)


def test_a_weight_whose_error_16_bits_hide() -> None:
    program = masked("bf16")
    source, ranks = captured(program), ranked(program, change=with_a_wrong_expert)
    assert error_on_the_example(source, ranks) < TOLERANCES["bf16"]
    with pytest.raises(VerificationError, match=r"rank \d computes another y: .* at most 2e-04"):
        check_ranks(source, ranks)


def test_nan_is_above_every_error_allowed() -> None:
    def broken(rank: Program) -> Program:
        changed = with_a_wrong_expert(rank).weights
        weights = {n: w * torch.nan if w is not rank.weights[n] else w for n, w in changed.items()}
        return replace(rank, weights=weights)

    program = masked("f32")
    with pytest.raises(VerificationError, match="differs from the model's by inf"):
        check_ranks(captured(program), ranked(program, change=broken), float("inf"))


def test_the_greatest_error_allowed() -> None:
    program = masked("f32")
    check_ranks(captured(program), ranked(program, change=with_a_wrong_expert), 0.5)
    with pytest.raises(VerificationError, match="at most 1e-12"):
        check_ranks(captured(program), ranked(program), 1e-12)


def test_rows_that_return_to_another_rank() -> None:
    """Where all ranks have the same rows, as in the example, this is not noticed."""
    program = model()
    graph, source = program.graph, captured(masked("f32"))
    right = rank_programs(program, plan(2))
    names = "rank.0.main", "rank.1.main"
    swapped = Module({name: with_the_rows_of(1 - i, right[name]) for i, name in enumerate(names)})
    source = replace(
        source,
        program=program,
        eager=lambda *case: evaluate(graph, case, program.weights),
        example=source.example[:1],
    )
    ranks = Ranked(program, swapped, plan(2))
    assert error_on_the_example(source, ranks) < TOLERANCES["f32"]
    with pytest.raises(VerificationError, match="rank 0 computes another"):
        check_ranks(source, ranks)


def with_the_rows_of(other: int, program: Program) -> Program:
    """With the result of the other one of two ranks."""
    start, end = ("0", "{T}") if other == 0 else ("{T}", "{2*T}")
    taking = f"""  both: f32[2*T, {D}] = dist.all_gather(z) <group="world", rows={{2*T}}>
  y: f32[T, {D}] = aten.slice.Tensor(both) <dim=0, start={start}, end={end}>
  return y
}}"""
    text = taking.join(print_graph(program.graph).rsplit("  return z\n}", 1))
    return replace(program, graph=parse(text))


def test_heads_of_another_rank() -> None:
    """Both ranks with the first half of the heads: their caches have the shapes of right ones."""
    family = FAMILIES["qwen3_moe"].one_layer()
    compiled = moec.compile(
        family.build(), (), family.inputs(2, 5), verify=False, stop_after="split-packed"
    )
    step, p = incremental(compiled.pass_results[-1].program), plan_for(compiled, 2, 0)
    right = rank_programs(step, p, function=DECODE).programs
    caches = first_step(right["rank.0.decode"], torch.zeros(2, 5, dtype=torch.int64))[4:]
    assert {len(cache) for cache in caches} == {2}
    wrong = Module({**right, "rank.1.decode": right["rank.0.decode"]})
    with pytest.raises(VerificationError, match=r"rank [01] computes another"):
        check_ranks(compiled.captured, Ranked(step, wrong, p, DECODE))
