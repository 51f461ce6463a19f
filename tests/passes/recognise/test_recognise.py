"""Recognition: every form and every expert becomes moe.* ops with the same numbers, or is
declined with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moec.capture import capture
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core import runner
from moec.passes.core.runner import Declined
from moec.passes.proof.prove import Prover
from moec.passes.recognise import RECOGNISERS
from moec.passes.recognise.reading.body import canonical
from moec.passes.simplify.canonicalise import Canonicalise
from moec.passes.simplify.share_common import ShareCommon
from moec.report.blocks import blocks
from moec.report.data import Block
from tests.passes.forms import loops, others, routers, stacks
from tests.passes.forms.experts import EXPERTS
from tests.passes.forms.sizes import D, E

Golden = Callable[[str], None]
BEFORE = (Canonicalise(), ShareCommon())


def recognised(
    module: nn.Module, x: Tensor | None = None, before: tuple[object, ...] = BEFORE
) -> tuple[Program, tuple[Block, ...], tuple[Declined, ...]]:
    torch.manual_seed(1)
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.4)
    example = torch.randn(6, D, dtype=next(module.parameters()).dtype) if x is None else x
    captured = capture(module, (example,))
    steps = runner.run(captured.program, [*before, *RECOGNISERS])  # type: ignore[list-item]
    program = steps[-1].program
    # Sums over at most H terms in another order: float32 keeps 1e-5, bfloat16 its own 8 bits.
    bound = 2e-5 if example.dtype is torch.float32 else 3e-2
    for count in (1, 5, 20):
        rows = torch.randn(count, *example.shape[1:], dtype=example.dtype)
        expected = captured.eager(rows)[0].float()
        (actual,) = evaluate(program.graph, [rows], program.weights)
        assert (actual.float() - expected).abs().max() <= bound * expected.abs().max()
    declined = tuple(d for step in steps for d in step.declined)
    return program, blocks(program.graph), declined


def check_text(program: Program, golden: Golden) -> None:
    text = print_graph(program.graph)
    assert print_graph(parse(text)) == text
    golden(text)


LOOPS = {
    "loop": loops.Loop,
    "batched-loop": loops.Batched3D,
    "one-hot": loops.OneHotLoop,
    "positive-shares": loops.PositiveShares,
    "rows": loops.RowsLoop,
    "slices": loops.SlicedLoop,
    "slots": loops.SlotLoop,
    "slots-inside": lambda: loops.SlotLoop(inside=True),
    "gathered": stacks.Gathered,
    "gathered-bmm": stacks.GatheredBmm,
    "gathered-columns": stacks.GatheredColumns,
    "gathered-summed": stacks.GatheredSummed,
    "embedded": stacks.Embedded,
    "capacity-slot": stacks.Capacity,
    "capacity-token": lambda: stacks.Capacity(by_slot=False),
    "all-weigh": stacks.AllThenWeigh,
    "all-where": stacks.AllThenWhere,
    "all-sum": stacks.AllThenSum,
    "all-matmul": stacks.AllThenMatmul,
    "all-gather": stacks.AllThenGather,
}
FORMS = {
    "loop": "static loop",
    "batched-loop": "static loop",
    "one-hot": "static loop",
    "positive-shares": "static loop",
    "rows": "static loop",
    "slices": "static loop",
    "slots": "static loop",
    "slots-inside": "static loop",
    "gathered": "gathered weights",
    "gathered-bmm": "gathered weights",
    "gathered-columns": "gathered weights",
    "gathered-summed": "gathered weights",
    "embedded": "gathered weights",
    "capacity-slot": "dense dispatch with capacity",
    "capacity-token": "dense dispatch with capacity",
    "all-weigh": "evaluate all, then select",
    "all-where": "evaluate all, then select",
    "all-sum": "evaluate all, then select",
    "all-matmul": "evaluate all, then select",
    "all-gather": "evaluate all, then select",
}


@pytest.mark.parametrize("name", LOOPS)
def test_forms(name: str, golden: Golden) -> None:
    example = torch.randn(2, 5, D) if name == "batched-loop" else None
    program, (block,), declined = recognised(LOOPS[name](), example)
    check_text(program, golden)
    assert block.form == FORMS[name]
    assert (block.experts, block.top_k) == (E, 2)
    router = "softmax, top-2" if name.startswith("capacity") else "softmax, top-2, renormalised"
    limit = f", at most 3 per expert, by {name.partition('-')[2]}"
    assert block.router == router + (limit if name.startswith("capacity") else "")
    assert declined == ()


@pytest.mark.parametrize(
    "name", ["rows", "slots-inside", "gathered", "embedded", "capacity-slot", "all-gather"]
)
def test_forms_as_captured(name: str) -> None:
    """Before any other pass has given the graph one spelling."""
    _, (block,), declined = recognised(LOOPS[name](), before=())
    assert (block.form, declined) == (FORMS[name], ())


@pytest.mark.parametrize("form", [stacks.Sorted, stacks.SortedBack])
def test_sorted(form: type[nn.Module], golden: Golden) -> None:
    program, (block,), declined = recognised(form().bfloat16())
    check_text(program, golden)
    assert block.form == "sort + grouped_mm"
    assert declined == ()


@pytest.mark.parametrize("expert", EXPERTS)
def test_experts(expert: str) -> None:
    others = {"geglu": stacks.AllThenGather, "normed": loops.RowsLoop}
    form = others.get(expert, loops.Loop)
    _, (block,), declined = recognised(form(EXPERTS[expert]))
    activations = {
        "packed": "swiglu",
        "interleaved": "clamped swiglu",
        "transposed": "tanh",
        "single": "linear",
        "normed": "custom",
    }
    assert block.activation == activations.get(expert, expert)
    assert declined == ()
    per_expert = sum(p.numel() for p in EXPERTS[expert]().parameters())
    assert (block.parameters, block.active_parameters) == (E * per_expert, 2 * per_expert)


ROUTERS = {
    "softmax_topk": "softmax, top-2",
    "softmax_topk_renormalised": "softmax, top-2, renormalised",
    "softmax_norm": "softmax, top-2, renormalised",
    "topk_softmax": "top-2, softmax",
    "sorted_softmax": "top-2, softmax",
    "topk_sigmoid": "top-2, sigmoid",
    "sigmoid_scaled": "sigmoid, top-2, renormalised, times 2.5",
    "switch": "softmax, top-1",
    "sparsemixer": "sparsemixer, top-2",
}


@pytest.mark.parametrize("rule", ROUTERS)
def test_routers(rule: str) -> None:
    _, (block,), declined = recognised(stacks.Gathered(getattr(routers, rule)))
    assert block.router == ROUTERS[rule]
    assert declined == ()


@pytest.mark.parametrize("version", [2, 3])
def test_grouped_routers(version: int) -> None:
    _, (block,), _ = recognised(loops.Loop(router=routers.Grouped(version), count=8))
    before, kind, after = {
        2: ("softmax", "max", ""),
        3: ("sigmoid, correction bias", "top2sum", "renormalised, "),
    }[version]
    assert block.router == f"{before}, best 2 of 4 groups by {kind}, top-3, {after}times 1.5"


@pytest.mark.parametrize(
    ("version", "experts", "groups", "count", "k", "visible"),
    [
        (3, 8, 4, 2, 2, True),  # a correction above all scores would hide it
        (3, 16, 8, 7, 2, True),  # seldom do they differ
        (2, 16, 4, 3, 4, True),
        (2, 16, 4, 3, 3, False),  # the best three lie in the best three groups
        (3, 8, 2, 2, 3, False),
    ],
)
def test_a_limit_to_groups_is_never_lost(
    version: int, experts: int, groups: int, count: int, k: int, visible: bool
) -> None:
    router = routers.Grouped(version, experts, groups, count, k)
    _, (block,), _ = recognised(loops.Loop(router=router, count=experts))
    assert (f"best {count} of {groups} groups" in block.router) == visible
    assert f"top-{k}" in block.router


def test_argmax_without_weights() -> None:
    _, (block,), _ = recognised(loops.RowsLoop(rule=routers.argmax_only))
    assert block.top_k == 1
    assert block.router == "top-1, weights of its own"


def test_weights_are_changed_after_the_routing() -> None:
    _, (block,), declined = recognised(loops.Loop(rule=routers.tempered))
    assert (block.router, list(declined)) == ("softmax, top-2, weights changed", [])


def test_unknown_router_leaves_the_block() -> None:
    program, (block,), declined = recognised(loops.Loop(rule=routers.worst))
    assert block.router == "custom"
    assert not any(op.name == "moe.route" for op in program.graph.ops)
    (why,) = declined
    assert re.fullmatch(
        r"router: custom: \d+ forms of routing were tried from linear; the last one: "
        r"weights or choices "
        r"differ \(.*\)",
        why.reason,
    )


def test_experts_that_copy_their_rows(golden: Golden) -> None:
    program, (block,), declined = recognised(others.Copies())
    check_text(program, golden)
    assert (block.form, block.experts, block.top_k) == ("static loop", E - 2, 2)
    assert (block.router, block.zero) == ("softmax, top-2, renormalised", "2 copy")
    assert declined == ()


@pytest.mark.parametrize("shared", [False, True])
def test_copies_of_all_tokens_are_added_to_rows(shared: bool) -> None:
    _, (block,), declined = recognised(stacks.Repeated(shared))
    assert (block.form, block.top_k) == ("evaluate all, then select", 1)
    assert block.router == "top-1, sigmoid, weights on the input"
    assert (block.shared, declined) == ("added" if shared else "", ())


def test_input_side(golden: Golden) -> None:
    program, (block,), declined = recognised(stacks.InputSide())
    check_text(program, golden)
    assert block.router == "top-2, sigmoid, weights on the input"
    (combine,) = [op for op in program.graph.ops if op.name == "moe.combine"]
    assert "weighted" not in combine.attrs
    assert declined == ()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_shared_experts(gated: bool, first: bool) -> None:
    _, (block,), declined = recognised(loops.SharedExpert(gated, first))
    assert block.shared == ("added, gated by a sigmoid" if gated else "added")
    assert declined == ()


@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_capacity_drops(size: int, by_slot: bool) -> None:
    program, (block,), _ = recognised(stacks.Capacity(size, by_slot))
    (drop,) = [op for op in program.graph.ops if op.name == "moe.capacity"]
    assert drop.attrs["capacity"] == size
    assert drop.attrs["order"] == ("slot" if by_slot else "token")
    assert f"at most {size} per expert" in block.router


def test_capacity_renormalised_after_drops() -> None:
    _, (block,), _ = recognised(stacks.Capacity(2, renormalise=True))
    assert block.form == "dense dispatch with capacity"


def test_switch_capacity() -> None:
    program, (block,), _ = recognised(stacks.SwitchCapacity())
    assert (block.form, block.top_k) == ("dense dispatch with capacity", 1)
    assert any(op.name == "moe.capacity" for op in program.graph.ops)


@pytest.mark.parametrize("width", [D, 1])
@pytest.mark.parametrize("sample", [False, True])
def test_gates_at_two_levels_are_one_block(sample: bool, width: int) -> None:
    """The experts of all groups; a gate may read a whole sample, and an expert give one number."""
    x = torch.randn(3, 7, D) if sample else None
    _, (block,), _ = recognised(others.TwoLevels(sample, width), x)
    assert block.form == "every expert, weighed at 2 levels"
    assert (block.experts, block.top_k) == (6, 6)


def test_experts_that_are_chosen_and_not_used_are_left_out() -> None:
    _, (block,), declined = recognised(others.MoreThanUsed())
    assert block.top_k == 2
    assert block.router == "top-2, softmax"
    assert declined == ()


REFUSED: dict[Callable[[], nn.Module], str] = {
    others.Unequal: "only 2 of the 4 experts that the router chooses among are alike",
    others.Missing: "its branches are the experts [0, 1, 3], expected 0 to 2",
    others.Thresholded: "static loop: the numbers differ by",
    others.NeverSkipped: "aten.gt.Scalar of exp has the same result on all random",
    others.Limited: "aten.clamp.default of sum_3 changes all values or none on all random inputs",
    others.NeverNegative: "changes all values or none on all random inputs",
    others.WrongExpert: "static loop: the numbers differ by",
    stacks.InputSideBiased: "evaluate all, then select: the numbers differ by",
    stacks.Misaligned: "sums over (feature 16, rows 4) and (rows 4, feature 16)",
    loops.OtherSlots: "static loop: the numbers differ by",
}


@pytest.mark.parametrize("form", REFUSED)
def test_refusals(form: Callable[[], nn.Module]) -> None:
    program, blocks, declined = recognised(form())
    assert blocks == ()
    assert not any(op.name.startswith("moe.") for op in program.graph.ops)
    assert any(REFUSED[form] in d.reason for d in declined), declined


def test_what_one_expert_cannot_do() -> None:
    """Where experts mix tokens, the ops before that op are a block, and those after it another."""
    program, blocks, declined = recognised(others.AcrossTokens())
    assert [(block.activation, block.top_k) for block in blocks] == [("linear", 2)] * 2
    assert [op.name for op in program.graph.ops].count("aten.mean.dim") == 1
    assert declined == ()


@pytest.mark.parametrize("form", [others.Dense, others.Ensemble])
def test_dense_models_are_left_alone_silently(form: type[nn.Module]) -> None:
    _, blocks, declined = recognised(form())
    assert (blocks, declined) == ((), ())


@pytest.fixture(scope="module")
def looped() -> Program:
    return recognised(loops.RowsLoop())[0]


@given(st.integers(0, 9), st.sampled_from(["random", "tied", "one", "zero"]), st.integers(0, 99))
def test_any_routing(looped: Program, tokens: int, kind: str, seed: int) -> None:
    """Empty experts, all tokens on one, ties, no tokens: against a loop written here."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, D)
    weights = dict(looped.weights)
    gate = {"random": torch.randn(E, D), "tied": torch.zeros(E, D), "zero": torch.zeros(E, D)}
    weights["router.gate.weight"] = gate.get(kind, torch.ones(E, D) * torch.arange(E)[:, None])
    logits = x @ weights["router.gate.weight"].T
    share, chosen = torch.sort(logits.softmax(-1), dim=-1, descending=True, stable=True)
    share, chosen = share[:, :2] / share[:, :2].sum(-1, keepdim=True), chosen[:, :2]
    expected = torch.zeros(tokens, D)
    for t in range(tokens):
        for s in range(2):
            layer = {
                part: weights[f"experts.{chosen[t, s]}.{part}.weight"]
                for part in ("gate", "up", "down")
            }
            hidden = torch.nn.functional.silu(layer["gate"] @ x[t]) * (layer["up"] @ x[t])
            expected[t] += share[t, s] * (layer["down"] @ hidden)
    (actual,) = evaluate(looped.graph, [x], weights)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_equal_layers_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    provers: dict[int, Prover] = {}
    prove = Prover.prove

    def record(prover: Prover, *args: Any, **options: Any) -> None:
        provers[id(prover)] = prover
        prove(prover, *args, **options)

    monkeypatch.setattr(Prover, "prove", record)
    layers = nn.Sequential(stacks.Gathered(), stacks.Gathered(), stacks.Gathered())
    _, blocks, _ = recognised(layers)
    assert len(blocks) == 3
    assert sum(len(prover.runs) for prover in provers.values()) == 2  # one region, one router
    assert [block.name for block in blocks] == ["0", "1", "2"]


def test_fuel_limits_recognition() -> None:
    captured = capture(nn.Sequential(stacks.Gathered(), stacks.Gathered()), (torch.randn(6, D),))
    program = runner.run(captured.program, RECOGNISERS, fuel=1)[-1].program
    assert len(blocks(program.graph)) == 1


def test_transposes_move_to_the_stack_and_cancel() -> None:
    body = parse("""
    graph body(x: f32[R, 8]; w: f32[16, 8], v: f32[16, 8]) {
      t: f32[8, 16] = aten.permute.default(w) <dims=(1, 0)>
      h: f32[R, 16] = aten.mm.default(x, t)
      y: f32[R, 8] = aten.mm.default(h, v)
      return y
    }""")
    graph, (first, second) = canonical(body, 4)
    assert [op.name for op in graph.ops] == ["aten.linear.default"] * 2
    assert first.steps == ()
    assert [(name, dict(attrs)) for name, attrs, _, _ in second.steps] == [
        ("aten.permute.default", {"dims": (0, 2, 1)})
    ]
