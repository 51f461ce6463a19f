"""insert-zero-experts: neutral columns change no bit, calibrated experts stay in the budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moec
from moec.capture.doors import capture_source, open_source
from moec.errors import UsageError
from moec.ir.graph import Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.graph_module import GraphModule
from moec.ir.ops.routing.routing import Routing, route_logits
from moec.ir.text import parse, print_graph
from moec.passes.approximate.insert_zero_experts import InsertZeroExperts
from moec.passes.core.runner import run
from moec.pipeline import LOWER
from tests.passes.changed import LAYER, change, declined, program, tokens

Golden = Callable[[str], None]

NEUTRAL = InsertZeroExperts()
CALIBRATED = InsertZeroExperts(way="calibrated", fraction=0.3)


@pytest.fixture(scope="module")
def trained(short_moe: Path) -> GraphModule:
    """The trained model, traced once for three compilations."""
    captured = capture_source(open_source(short_moe))
    return GraphModule(captured.program, {}, (captured.example, {}), captured.structure)


@pytest.mark.parametrize("pass_", [NEUTRAL, CALIBRATED], ids=lambda p: p.way)
def test_text(golden: Golden, pass_: InsertZeroExperts) -> None:
    graph = change(program(1), pass_)[-1].program.graph
    assert print_graph(parse(print_graph(graph))) == print_graph(graph)
    golden(print_graph(graph))


def test_fused_text(golden: Golden) -> None:
    """What code is generated from: the experts' sum, z and the residual are one combine."""
    changed = change(program(1), NEUTRAL)[-1].program
    golden(print_graph(run(changed, LOWER.passes, stage=Stage.MOE)[-1].program.graph))


# ---- neutral -----------------------------------------------------------------------------


class Own(torch.nn.Module):
    """An MoE layer with a shared expert, in a form that is recognised; k of `count` experts."""

    def __init__(self, count: int, k: int, bias: bool, renormalise: bool) -> None:
        super().__init__()
        self.k, self.renormalise = k, renormalise
        self.gate = torch.nn.Linear(24, count, bias=bias)
        self.up = torch.nn.Parameter(torch.randn(count, 40, 24) / 5)
        self.down = torch.nn.Parameter(torch.randn(count, 24, 40) / 6)
        self.shared = torch.nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1, dtype=torch.float32).topk(self.k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        hidden = torch.nn.functional.silu(torch.einsum("td,tkhd->tkh", x, self.up[ids]))
        rows = torch.einsum("tkh,tkdh->tkd", hidden, self.down[ids])
        out = (rows * weights[..., None]).sum(1).to(x.dtype)
        return x + out + self.shared(x)


@pytest.mark.parametrize(
    ("count", "k", "bias", "renormalise", "dtype", "options"),
    [
        (16, 2, False, True, torch.bfloat16, {"constant": 1}),
        (7, 3, True, False, torch.float32, {"zero": 3, "copy": 0, "constant": 6}),
    ],
)
def test_neutral_columns_change_no_bit(count, k, bias, renormalise, dtype, options) -> None:
    """Compiled before and after: one vector of scores and two, and a shared expert and a residual
    that are added in the same order."""
    torch.manual_seed(count)
    layer = Own(count, k, bias, renormalise).to(dtype).eval()
    example = torch.randn(5, 24, dtype=dtype)
    plain = moec.compile(layer, (example,), verify=False)
    inserted = moec.compile(
        layer,
        (example,),
        passes=[InsertZeroExperts(**options)],
        calib={"x": torch.randn(400, 24)},
        budget="error<=1e-5,changed<=0",
        verify=False,
    )
    (damage,) = inserted.report().damage
    assert damage.applied
    assert len(inserted.blocks) == 1
    assert inserted.blocks[0].zero
    for tokens_, scale in ((0, 1), (1, 1), (3, 0), (64, 1), (64, 50), (200, 3)):
        x = (torch.randn(tokens_, 24) * scale).to(dtype)
        assert torch.equal(plain(x), inserted(x))


def test_neutral_on_a_trained_model(trained: GraphModule) -> None:
    options = {"kv_cache": False, "verify": False}
    plain = moec.compile(trained, **options)
    calib = {"input_ids": torch.randint(1024, (4, 64))}
    inserted = moec.compile(trained, passes="+insert-zero-experts", calib=calib, **options)
    assert [block.zero for block in inserted.blocks] == ["2 constant, 1 copy, 1 zero"] * 2
    for shape in ((1, 1), (2, 9), (1, 120)):
        ids = torch.randint(1024, shape)
        assert torch.equal(plain(ids).logits, inserted(ids).logits)


@given(
    logits=st.lists(
        st.lists(st.sampled_from([-1e30, -200.0, -2.0, 0.0, 0.5, 3.0]), min_size=5, max_size=5),
        max_size=4,
    ),
    k=st.integers(1, 5),
    score=st.sampled_from(["softmax", "sigmoid", "none"]),
    corrected=st.booleans(),
)
def test_new_columns_are_never_chosen(logits, k, score, corrected) -> None:
    """Over any scores, ties and k = E included."""
    routing = Routing(k, score=score, after="softmax" if score == "none" else "none")
    old = torch.tensor(logits).reshape(-1, 5)
    new = torch.cat([old, torch.full((len(old), 3), -torch.inf)], 1)
    bias = torch.tensor([0.1, -0.3, 0.0, 0.0, -5.0]) if corrected else None
    longer = None if bias is None else torch.cat([bias, torch.full((3,), -torch.inf)])
    for actual, theirs in zip(
        route_logits(routing, new, longer), route_logits(routing, old, bias), strict=True
    ):
        if actual.dtype == torch.int64:
            assert torch.equal(actual, theirs)
        else:
            torch.testing.assert_close(actual, theirs, rtol=1e-6, atol=0)


def test_opened_columns_are_chosen_and_mean_what_the_paper_says() -> None:
    """With a bias of 0 the inserted experts work: what a fine-tuning starts from."""
    changed = change(program(1), NEUTRAL)[-1].program
    (bias,) = [name for name in changed.weights if name.endswith("router.bias")]
    assert torch.equal(changed.weights[bias][:4], torch.zeros(4))
    assert (changed.weights[bias][4:] == -torch.inf).all()
    weights = {**changed.weights, bias: torch.tensor([0.0] * 4 + [50.0] * 4)}
    route = next(op for op in changed.graph.ops if op.name == "moe.route")
    zero = next(op for op in changed.graph.ops if op.name == "moe.zero_experts")
    combine = next(op for op in changed.graph.ops if op.name == "moe.combine")
    probes = (*zero.inputs, *zero.outputs, *combine.outputs, *route.outputs)
    graph = type(changed.graph)(
        changed.graph.inputs,
        changed.graph.params,
        changed.graph.ops,
        probes,
        (),
        changed.graph.bounds,
    )
    x, ids, share, mix, vectors, z, y, _, _ = evaluate(graph, [tokens(64)], weights)
    assert (ids >= 4).all()
    assert y.abs().max() == 0
    for t in range(len(x)):
        expected = torch.zeros(8)
        for e, w in zip(ids[t].tolist(), share[t], strict=True):
            if e == 5:
                expected += w * x[t]
            elif e >= 6:
                a, b = (mix[e - 6] @ x[t]).softmax(-1)
                expected += w * (a * x[t] + b * vectors[e - 6])
        torch.testing.assert_close(z[t], expected, rtol=1e-5, atol=1e-6)


# ---- calibrated --------------------------------------------------------------------------


def test_calibrated_takes_the_share_it_was_asked_for() -> None:
    original = program()
    for fraction in (0.1, 0.5):
        step = change(original, InsertZeroExperts(way="calibrated", fraction=fraction))[-1]
        for line in step.damage.layers:
            share = float(line.says.partition("%")[0]) / 100
            assert fraction - 0.05 <= share <= fraction  # equal tokens go or stay together
            assert line.flops_saved > 0
        assert step.damage.after.error > 0
    assert step.damage.flops_after < step.damage.flops_before


def test_calibrated_more_choices_cost_more() -> None:
    errors = [
        change(program(), InsertZeroExperts(way="calibrated", fraction=f))[-1].damage.after.error
        for f in (0.05, 0.3, 0.9)
    ]
    assert errors == sorted(errors)


def test_best_stand_in_misses_least() -> None:
    """By construction, in the layer that is changed first: the others see other inputs."""
    errors = {
        by: change(program(1), InsertZeroExperts(way="calibrated", fraction=1.0, by=by))[-1]
        .damage.layers[0]
        .error
        for by in ("best", "zero", "copy", "constant")
    }
    assert errors["best"] <= min(errors["zero"], errors["copy"], errors["constant"]) * 1.001
    assert errors["zero"] == pytest.approx(1.0)


def test_the_budget_undoes_a_layer() -> None:
    original = program()
    step = change(original, InsertZeroExperts(way="calibrated", fraction=0.9), limit="error<=1e-4")[
        -1
    ]
    assert step.program is original
    assert all(line.undone and line.says.startswith("undone: error") for line in step.damage.layers)


def test_calibrated_compiles_and_is_verified(trained: GraphModule) -> None:
    """The code against the changed graph in eager, with rows without an expert."""
    calib = {"input_ids": torch.randint(1024, (4, 64))}
    model = moec.compile(
        trained, passes=[CALIBRATED], calib=calib, budget="kl<=0.2", kv_cache=False, verify=True
    )
    assert model.checked is not None
    (damage,) = model.report().damage
    assert damage.after.kl <= 0.2
    assert all(block.zero and "some choices replaced" in block.router for block in model.blocks)


# ---- refusals ----------------------------------------------------------------------------


CAPACITY = LAYER.replace(
    "  rows#", "  d#: i64[B*S, 2] = moe.capacity(i#) <num_experts=4, capacity=9>\n  rows#"
).replace("dispatch(IN, i#)", "dispatch(IN, d#)")


@pytest.mark.parametrize(
    ("layer", "pass_", "reason"),
    [
        (CAPACITY, NEUTRAL, "the router drops choices beyond a capacity"),
        (
            LAYER.replace("dispatch(IN, i#)", "dispatch(IN, i#, w#)"),
            NEUTRAL,
            "the routing weights scale the inputs of the experts",
        ),
        (
            LAYER.replace("combine(out#, order#, w#)", "combine(out#, order#)").replace(
                ", weighted=true", ""
            ),
            NEUTRAL,
            "the outputs of the experts are not weighted",
        ),
        (
            LAYER.replace("combine(out#, order#, w#)", "combine(out#, order#, w#, IN)").replace(
                "weighted=true", "weighted=true, added=true"
            ),
            NEUTRAL,
            "another branch is added inside moe.combine",
        ),
        (
            LAYER.replace("<k=2, renormalize=true>", "<k=2, groups=2, top_groups=2>"),
            NEUTRAL,
            "the router chooses among groups of experts, which are of one size",
        ),
        (
            LAYER.replace("<k=2, renormalize=true>", '<k=2, score="sparsemixer", jitter=0.1>'),
            NEUTRAL,
            "the router's scores depend on which logits are near the greatest",
        ),
        (
            LAYER.replace("  w#:", "  t#: f32[B*S, 4] = aten.tanh.default(logits#)\n  w#:").replace(
                "route(logits#)", "route(t#)"
            ),
            NEUTRAL,
            "the logits are not the output of a linear layer with its own weight",
        ),
        (
            LAYER,
            InsertZeroExperts(zero=0, copy=0, constant=0),
            "zero, copy and constant are all 0: give at least one above 0",
        ),
        (
            LAYER,
            InsertZeroExperts(way="calibrated", fraction=0.0),
            "fraction=0 of 512 choices rounds to no choice: give a greater share",
        ),
    ],
)
def test_refusals(layer: str, pass_: InsertZeroExperts, reason: str) -> None:
    assert declined(program(1, layer), pass_).startswith(reason)


def test_a_layer_that_has_them_is_left_to_itself() -> None:
    once = change(program(1), NEUTRAL)[-1].program
    assert declined(once, NEUTRAL) == "some experts of the router have no network (zero experts)"


def test_options() -> None:
    with pytest.raises(UsageError, match="way is 'x', expected one of neutral, calibrated"):
        InsertZeroExperts(way="x")
    with pytest.raises(UsageError, match="constant is -1, expected a whole number from 0"):
        InsertZeroExperts(constant=-1)
