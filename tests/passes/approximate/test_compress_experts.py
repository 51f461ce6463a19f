"""compress-experts: ternary weights and weights of two bits, fitted to the experts' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from moec.ir.formats.compressed import PARTS, decompress
from moec.ir.formats.ternary import codes_of, grid_of, values
from moec.ir.graph import Program, Stage, Value
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.run_in_float32 import all_in_float32
from moec.ir.text import print_graph
from moec.passes.approximate.compress_experts import CompressExperts, rows_of_experts
from moec.passes.calibration.gptq import damp, hessian
from moec.passes.core.runner import Pass, run
from moec.passes.lower.expand_experts import ExpandExperts
from moec.passes.lower.fuse_activation import FuseActivation
from moec.passes.lower.fuse_decompress import FuseDecompress
from moec.passes.lower.fuse_dispatch import FuseDispatch
from tests.passes.changed import LAYER, SCALED, change, declined, outputs, program, tokens

TERNARY = CompressExperts()
LOWERED = (ExpandExperts(), FuseActivation(), FuseDispatch(), FuseDecompress())


def lowered(of: Program, passes: Sequence[Pass] = LOWERED) -> Program:
    return run(of, passes, stage=Stage.MOE)[-1].program


def stack(of: Program, name: str, width: int) -> torch.Tensor:
    return decompress([of.weights[f"{name}.{part}"] for part in PARTS], width)


def test_text(golden):
    after = change(program(1), TERNARY)[-1].program
    golden(print_graph(after.graph) + print_graph(lowered(after).graph))


def test_rounding_to_nearest_is_the_weights_in_codes():
    before = program(2)
    after = change(before, CompressExperts(by="nearest"))[-1].program
    for name, width in (("w1", 8), ("w3", 8), ("w2", 6)):
        for i in range(2):
            weight = before.weights[f"layers.{i}.{name}"]
            grid = grid_of(weight)
            expected = values(codes_of(weight, grid), grid)
            assert torch.equal(stack(after, f"layers.{i}.{name}", width), expected)
            assert f"layers.{i}.{name}" not in after.weights


def test_what_is_fitted_loses_less_than_what_is_rounded():
    """Of 6 and 8 random inputs little can be made up for; examples/08_compress.py has a model."""
    lost = []
    for by in ("gptq", "nearest"):
        step = change(program(2), CompressExperts(by=by))[-1]
        lost.append(sum(line.error for line in step.damage.layers))
    assert lost[0] < 0.9 * lost[1]


def lost(pass_: CompressExperts) -> torch.Tensor:
    """What each row of random weights [2, 6, 24] loses of its own results."""
    torch.manual_seed(0)
    weight, x = torch.randn(2, 6, 24), torch.randn(2, 60, 24) + torch.randn(2, 60, 1)
    second = hessian(x)
    off = values(*pass_._fitted(weight, grid_of(weight), second)) - weight
    return ((off @ damp(second)) * off).sum(-1)


def test_a_descent_loses_less_than_gptq_alone():
    further, alone = lost(CompressExperts()), lost(CompressExperts(rounds=0))
    assert (further <= alone * (1 + 1e-5)).all()
    assert further.sum() < alone.sum()


def test_a_shorter_reach_leaves_fewer_zeros():
    changed = [change(program(1), CompressExperts(reach=r))[-1].program for r in (1.0, 0.7, 0.4)]
    zeros = [int((stack(p, "layers.0.w1", 8) == 0).sum()) for p in changed]
    assert zeros[0] > zeros[1] > zeros[2]


def test_the_fused_product_means_the_compressed_model():
    """But for rows of 16 bits: half a 32767th of the greatest, in sums of 8 and 6."""
    after = change(program(2), TERNARY)[-1].program
    fused = lowered(after)
    names = [op.name for op in fused.graph.ops]
    assert names.count("grouped.compressed") == 4
    assert "grouped.linear" not in names
    assert "moe.decompress" not in names
    ids = tokens(48, 3)
    (expected,), (actual,) = outputs(after, ids), outputs(fused, ids)
    assert 0 < (actual - expected).norm() <= 1e-4 * expected.norm()
    after.weights["embed"][:, 0] = 1000.0
    (expected,), (actual,) = (all_in_float32(part, [[ids]])[0] for part in (after, fused))
    torch.testing.assert_close(actual, expected)  # beside 1000, 16 bits lose the small elements


def test_bytes_are_those_of_the_parts():
    step = change(program(1), TERNARY)[-1]
    (line,) = step.damage.layers
    before = 4 * 4 * 3 * 48
    stored = sum(
        t.numel() * t.element_size()
        for name, t in step.program.weights.items()
        if name.split(".")[-1] in ("stream", "starts", "grid")
    )
    assert line.bytes_saved == before - stored
    assert line.says.startswith(f"ternary, {8 * stored / (4 * 3 * 48):.3f} bits a weight, ")
    widths = {"w1": 8, "w3": 8, "w2": 6}
    stacks = [stack(step.program, f"layers.0.{n}", w) for n, w in widths.items()]
    zeros = torch.cat([weights.flatten() for weights in stacks]) == 0
    assert line.says.endswith(f", {zeros.double().mean():.1%} zeros")


def test_an_expert_without_rows_is_rounded_and_named():
    before = program(1)
    router = before.weights["layers.0.router"]
    router[1] = 0
    before.weights["embed"][:, 0] = 5  # so that a great negative weight keeps expert 1 out
    router[1, 0] = -100
    step = change(before, TERNARY)[-1]
    (line,) = step.damage.layers
    assert line.says.endswith("; no rows for 1, rounded to nearest")
    weight = before.weights["layers.0.w1"]
    grid = grid_of(weight)
    result = stack(step.program, "layers.0.w1", 8)
    assert torch.equal(result[1], values(codes_of(weight, grid), grid)[1])
    assert not torch.equal(result[0], values(codes_of(weight, grid), grid)[0])


def test_a_favourite_counts_four_times_the_mean():
    """32 choices of 16 experts, all on one: the first eight of its rows."""
    stats = SimpleNamespace(
        x=torch.arange(32.0)[:, None],
        experts=torch.zeros(32, 1, dtype=torch.int64),
        weights=torch.ones(32, 1),
    )
    layer = SimpleNamespace(count=16, dispatch=SimpleNamespace(inputs=("x", "experts")))
    rows = rows_of_experts(layer, stats)
    assert rows[0].flatten().tolist() == list(range(8))
    assert [len(entry) for entry in rows[1:]] == [0] * 15


def test_rows_are_scaled_where_the_dispatch_scales_them():
    x, weights = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 3.0], [7.0, 11.0]])
    stats = SimpleNamespace(x=x, experts=torch.tensor([[0, 1], [1, 0]]), weights=weights)
    for inputs, expected in ((2, [[1, 2], [1, 2]]), (3, [[0.5, 22], [3, 14]])):
        layer = SimpleNamespace(count=2, dispatch=SimpleNamespace(inputs=range(inputs)))
        assert [entry.flatten().tolist() for entry in rows_of_experts(layer, stats)] == expected


def test_experts_are_fitted_alike_in_groups_of_any_size(monkeypatch):
    results = []
    for size in (16, 3):
        monkeypatch.setattr("moec.passes.approximate.compress_experts.GROUP", size)
        results.append(change(program(1), TERNARY)[-1].program.weights)
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_the_last_matrix_is_fitted_to_what_the_compressed_first_ones_give(monkeypatch):
    read = []
    monkeypatch.setattr(
        "moec.passes.approximate.compress_experts.hessian", lambda x: read.append(x) or hessian(x)
    )
    changed = change(program(1), TERNARY)[-1].program
    gate, up = (stack(changed, f"layers.0.{name}", 8) for name in ("w1", "w3"))
    count = len(gate)
    assert len(read) == 2 * count
    for e, (x, hidden) in enumerate(zip(read[:count], read[count:], strict=True)):
        torch.testing.assert_close(hidden, F.silu(x @ gate[e].T) * (x @ up[e].T))


def test_the_last_matrix_mends_what_the_first_ones_lose(monkeypatch):
    """It aims at the original's results; aiming at its own weight's loses more."""
    aiming = change(program(2), TERNARY)[-1].damage.layers
    monkeypatch.setattr(
        "moec.passes.approximate.compress_experts.retarget", lambda weight, *_: weight
    )
    plain = change(program(2), TERNARY)[-1].damage.layers
    assert sum(line.error for line in aiming) < 0.9 * sum(line.error for line in plain)


def test_experts_that_scale_their_input_are_fitted_to_scaled_rows():
    """A weight on the input's side: twice the scale is the same fit, another scale is not."""
    scaled = SCALED.replace(
        "moe.combine(out#, order#, w#)\n    <k=2, tokens={B*S}, dtype=f32, weighted=true>",
        "moe.combine(out#, order#)\n    <k=2, tokens={B*S}, dtype=f32>",
    )
    before = program(1, scaled)
    after = change(before, TERNARY)[-1].program
    ids = tokens(32, 4)
    (expected,) = outputs(before, ids)
    (actual,) = outputs(after, ids)
    assert (actual - expected).norm() < 0.5 * expected.norm()
    (fused,) = outputs(lowered(after), ids)
    torch.testing.assert_close(fused, actual, rtol=1e-3, atol=1e-3)


def test_the_budget_undoes_layers():
    step = change(program(2), TERNARY, limit="error<=1e-6")[-1]
    assert [line.undone for line in step.damage.layers] == [True, True]
    assert "moe.decompress" not in print_graph(step.program.graph)


def test_a_second_pass_finds_nothing():
    steps = change(program(1), TERNARY, TERNARY)
    assert [d.reason for d in steps[-1].declined] == [
        f"the weights {name} are compressed already"
        for name in [steps[1].program.graph.producers[v].outputs[0].name
                     for op in steps[1].program.graph.ops if op.name == "moe.experts"
                     for v in op.inputs[2:3]]
    ]  # fmt: skip


COMPUTED = LAYER.replace(
    "y: f32[R, 8] = aten.linear.default(h, b2)",
    "b: f32[8, 6] = aten.mul.Scalar(b2) <other=2.0>\n      y: f32[R, 8] = "
    "aten.linear.default(h, b)",
)
TWICE = LAYER.replace("aten.linear.default(bx, b3)", "aten.linear.default(bx, b1)")
NONE = LAYER[: LAYER.index("      g: f32")] + (
    "      y: f32[R, 8] = aten.silu.default(bx)\n" + LAYER[LAYER.index("      return y") :]
)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (COMPUTED, "the experts' weight b is computed from others"),
        (TWICE, "the experts' weight b1 is read more than once"),
        (NONE, "the experts hold no linear layer with a weight of their own"),
    ],
    ids=["computed", "twice", "none"],
)
def test_declines(layer, says):
    assert says in declined(program(1, layer), TERNARY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_declined(value):
    before = program(1)
    unused = before.weights["layers.0.w1"]
    unused[3, 0, 0] = value
    router = before.weights["layers.0.router"]
    before.weights["embed"][:, 0] = 5
    router[3], router[3, 0] = 0, -100
    assert "layers.0.w1 hold an infinity or a NaN" in declined(before, TERNARY)


def test_products_of_matrices_compressed_in_two_ways_are_left_alone():
    after = change(program(1), TERNARY)[-1].program
    grouped = lowered(after, LOWERED[:3])
    text = print_graph(grouped.graph)
    assert "moe.decompress" in text
    (linear, *_) = [op for op in grouped.graph.ops if op.name == "grouped.linear"]
    source = grouped.graph.producers[linear.inputs[2]]
    plain = Value("plain", source.outputs[0].type)
    ops = tuple(
        replace(op, inputs=tuple(plain if v is source.outputs[0] else v for v in op.inputs))
        for op in grouped.graph.ops
        if op is not source
    )
    params = (*grouped.graph.params, plain)
    mixed = Program(
        replace(grouped.graph, ops=ops, params=params),
        {**grouped.weights, "plain": torch.zeros([int(d) for d in plain.shape])},
    )
    step = run(mixed, [FuseDecompress()], stage=Stage.GROUPED)[-1]
    assert "not all compressed in one way" in "; ".join(d.reason for d in step.declined)
    evaluate(step.program.graph, [tokens(16)], step.program.weights)
