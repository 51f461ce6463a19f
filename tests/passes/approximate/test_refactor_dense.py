"""refactor-dense: experts for domains of text, and one router for all layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.errors import UsageError
from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate, run_graph
from moec.ir.text import parse, print_graph
from moec.passes.approximate.causal_router import causal_router, distill
from moec.passes.approximate.refactor_dense import RefactorDense
from moec.passes.core.runner import run
from moec.passes.specialise.hoist_routers import split
from moec.pipeline import choose
from tests.passes.dense_blocks import (
    BIASED,
    DOMAINS,
    FLAT,
    GATED,
    SMALL,
    change,
    choices,
    everything,
    hidden,
    program,
    tokens,
)


def test_text(golden):
    golden(print_graph(change(program(), RefactorDense(width=4, steps=1)).program.graph))


def masked(program: Program, layer: str, ids: Tensor, remaining: Tensor) -> Tensor:
    """The model of one layer with the channels `kept` [T, 12] of each token alone."""
    w = {name.removeprefix("layers.0."): t for name, t in program.weights.items()}
    x = w["embed"][ids.flatten()]
    a = F.silu(F.linear(x, w["w1"], w["b1"] if layer == "biased" else None))
    h = a * (a if layer == "biased" else F.linear(x, w["w3"]))
    y = F.linear(h * remaining, w["w2"], w["b2"] if layer == "biased" else None)
    return F.linear(x + y, w["embed"]).reshape(*ids.shape, -1)


@pytest.mark.parametrize(
    ("layer", "keep", "permanent"),
    [("gated", 0.75, True), ("flat", 0.5, True), ("biased", 0.5, True), ("biased", 0.1, False)],
)
def test_a_token_meets_the_channels_that_its_domain_keeps(layer, keep, permanent):
    """Only the order of sums over channels changes. Where none is permanent each expert has the
    bias of the last layer."""
    original = program(1, {"gated": GATED, "biased": BIASED, "flat": FLAT}[layer])
    masks = []
    for channels in hidden(original).reshape(2, -1, 12):  # a domain each
        strongest = channels.abs().mean(0).topk(round(keep * 12)).indices
        masks.append(torch.zeros(12).scatter(0, strongest, 1))
    assert bool((masks[0] * masks[1]).any()) == permanent
    changed = change(original, RefactorDense(keep=keep, width=4, steps=20)).program
    chosen = choices(changed, ids := everything())
    assert set(chosen.tolist()) == {0, 1}
    expected = masked(original, layer, ids, torch.stack(masks)[chosen])
    (actual,) = evaluate(changed.graph, [ids], changed.weights)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_contribution_counts_what_a_channel_writes():
    original = program(1)
    weak = int(hidden(original).abs().mean((0, 1)).argmin())
    original.weights["layers.0.w2"][:, weak] *= 1000
    for by, remaining in (("activation", False), ("contribution", True)):
        changed = change(original, RefactorDense(by=by, keep=0.25, width=4, steps=1)).program
        stored = [t for name, t in changed.weights.items() if name.startswith("layers.0.w2")]
        assert (max(float(t.abs().max()) for t in stored) > 100) == remaining


def test_one_router_comes_before_all_layers():
    changed = change(program(3)).program
    names = [op.name for op in changed.graph.ops]
    assert names.count("moe.route") == 1
    assert names.count("moe.experts") == 3
    assert names.index("moe.route") < names.index("moe.dispatch")
    route = names.index("moe.route")
    assert all(op.origin in ("", "router") for op in changed.graph.ops[:route])


def test_the_router_is_a_function_of_tokens_alone_and_gives_the_same_bits():
    changed = change(program(3)).program
    passes = choose(2, "+hoist-routers")
    first = [each.name for each in passes].index("fold-addend")
    lowered = run(changed, passes[first:], stage=Stage.MOE)[-1].program
    assert [op.name for op in lowered.graph.ops].count("moe.sort") == 1
    parts = split(lowered)
    assert [v.name for v in parts.route.graph.inputs] == ["ids"]
    assert [c.layer for c in parts.choices] == ["layers.0", "layers.1", "layers.2"]
    ids = DOMAINS["low"]["ids"]
    chosen = evaluate(parts.route.graph, [ids], parts.route.weights)
    (full,) = evaluate(lowered.graph, [ids], lowered.weights)
    (routed,) = evaluate(parts.routed.graph, [ids, *chosen], parts.routed.weights)
    assert torch.equal(full, routed)


def test_what_comes_later_does_not_route_what_came_before():
    changed = change(program()).program
    ids = torch.cat([DOMAINS["low"]["ids"], DOMAINS["high"]["ids"]])
    other = ids.clone()
    other[:, 10:] = (other[:, 10:] + 7) % 20
    before, after = (choices(changed, inputs).reshape(ids.shape) for inputs in (ids, other))
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before, after)


def test_a_router_learns_what_only_the_text_before_tells():
    """Sequences are of an expert that their first token names; the others are alike."""
    graph = causal_router(
        parse("graph g(e: f32[B, S, 8]) {\n return e\n}").inputs[0], width=16, experts=3
    )
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(8, 8, generator=generator)
    ids = torch.randint(3, 8, (48, 6), generator=generator)
    ids[:, 0] = torch.arange(48) % 3
    target = F.one_hot(ids[:, :1].expand(48, 6), 3).float().flatten(0, 1)
    trained = distill(graph, [table[ids]], [target], steps=120, seed=0)
    (logits,) = run_graph(graph, [table[ids], *trained])
    assert float((logits.argmax(-1) == target.argmax(-1)).float().mean()) > 0.95


def test_each_domain_is_sent_to_its_expert_and_that_is_said():
    original = program()
    for i in range(2):  # half of the channels are silent for each domain
        original.weights[f"layers.{i}.w1"][:, 0] = torch.tensor([3.0, -3.0]).repeat_interleave(6)
    step = change(original, RefactorDense(width=16, steps=60))
    for domain, says in zip(DOMAINS, step.says, strict=True):
        assert says.startswith(f"tokens of {domain} go ")
        share = says.partition(f"% to {domain}'s")[0].split()[-1]
        assert int(share) > 90
    line = step.damage.layers[0].says
    assert line.endswith("expert: low, high")
    assert step.damage.after.changed == 1


def test_damage_is_less_than_that_of_random_channels():
    errors = {
        by: change(program(), RefactorDense(by=by, width=4, steps=20)).damage.after.error
        for by in ("activation", "random")
    }
    assert errors["activation"] < 0.9 * errors["random"]


def test_what_would_break_the_budget_is_undone():
    original = program()
    step = change(original, limit="error<=0.0001")
    assert step.program is original
    assert all(line.undone for line in step.damage.layers)
    first, second = (line.after.error for line in change(original).damage.layers)
    assert first < second
    half = change(original, limit=f"error<={(first + second) / 2}")
    assert [line.undone for line in half.damage.layers] == [False, True]
    assert [op.name for op in half.program.graph.ops].count("moe.experts") == 1


def declined(program: Program, pass_: RefactorDense = SMALL, calib: Any = DOMAINS) -> str:
    step = change(program, pass_, calib=calib)
    assert step.program is program
    assert not step.damage.applied
    return "; ".join(f"{d.where}: {d.reason}" for d in step.declined)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            GATED.replace("(IN, y#)", "(n#, y#)").replace(
                "  x#:", "  n#: f32[B, S, 8] = aten.linear.default(u#, layers.#.w2)\n  x#:"
            ),
            "layers.0: its channels u0 are also read by aten.linear.default",
        ),
        (
            GATED.replace("linear.default(IN, layers.#.w3)", "linear.default(n#, layers.#.w3)")
            .replace("  g#:", "  n#: f32[B, S, 8] = aten.neg.default(IN)\n  g#:"),
            "layers.0: its linear layers do not all read the same: h and n0",
        ),
        (
            GATED.replace("layers.#.w2)", "n#)")
            .replace("  g#:", "  n#: f32[8, 12] = aten.neg.default(layers.#.w2)\n  g#:"),
            "layers.0: the weights of y0 are computed, not stored",
        ),
        (
            GATED.replace("  u#: f32[B, S, 12] = aten.linear.default(IN, layers.#.w3)",
                          "  u#: f32[B, S, 1] = aten.linear.default(IN, one)"),
            "layers.0: u0: f32[B, S, 1] mixes channels before h0",
        ),
        (
            "\n  m#: f32[B, 8] = aten.mean.dim(IN) <dim=(1,)>"
            + GATED.replace("(IN, layers", "(m#, layers").replace("[B, S, 12]", "[B, 12]")
            .replace("y#: f32[B, S, 8]", "y#: f32[B, 8]")
            .replace("(IN, y#)", "(IN, r#)").replace(
                "  x#:", "  r#: f32[B, 1, 8] = aten.reshape.default(y#) <shape=({B}, 1, 8)>\n  x#:"
            ),
            "layers.0: its rows m0: f32[B, 8] are not one for each token of ids: i64[B, S]",
        ),
        (
            "\n  x#: f32[B, S, 8] = aten.neg.default(IN)\n",
            "the model: it has no dense feed-forward layer that could be found",
        ),
    ],
    ids=["read", "two inputs", "computed", "one channel", "rows", "none"],
)  # fmt: skip
def test_declines(layer, says):
    assert says in declined(program(1, layer))


def test_declines_what_has_nothing_to_choose():
    same = {"low": tokens(0, 10), "high": tokens(0, 10)}
    says = "layers.0: all domains keep the same channels, so the experts would be equal"
    assert says in declined(program(1), calib=same)
    for keep, which in ((1.0, "all"), (0.01, "none")):
        says = f"keep={keep:g} of 12 channels is {which} of them"
        assert says in declined(program(1), RefactorDense(keep=keep))


def test_declines_a_model_that_reads_no_tokens():
    original = program(1)
    text = print_graph(original.graph).replace("ids: i64[B, S]", "x: f32[B, S, 8]")
    text = text.replace("aten.embedding.default(embed, ids)", "aten.neg.default(x)")
    changed = Program(parse(text), original.weights)
    data = {name: {"x": torch.randn(16, 16, 8)} for name in DOMAINS}
    says = "the model: the model has no input of token ids [B, S] that a router could read"
    assert says in declined(changed, calib=data)


@pytest.mark.parametrize(
    ("calib", "says"),
    [
        (DOMAINS["low"], "an expert for each domain of the calibration data: name two or more"),
        ({"low": DOMAINS["low"]}, "name two or more, as in --calib code=code.txt,prose=prose.txt"),
        (
            {**DOMAINS, "high": tokens(10, 20, 128)},
            "the calibration data of high hold 128 tokens, too few to choose channels by: give at "
            "least 256",
        ),
    ],
)
def test_data_are_refused(calib, says):
    with pytest.raises(UsageError, match=says):
        change(program(1), calib=calib)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 1.5}, "keep is 1.5, expected a number from 0 to 1"),
        ({"by": "reap"}, "by is 'reap', expected one of activation, contribution, random"),
        ({"width": 10}, "width is 10, expected a multiple of the router's 4 heads"),
        ({"width": 0}, "width is 0, expected a whole number from 4"),
        ({"steps": 0}, "steps is 0, expected a whole number from 1"),
    ],
)
def test_options_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        RefactorDense(**options)


IDS = torch.arange(14).reshape(2, 7)
TWO = {
    name: {"ids": torch.arange(first, first + 256).reshape(16, 16) % 20 + first}
    for name, first in (("low", 0), ("high", 20))
}


class Small(nn.Module):
    """ids [B, S] -> scores [B, S, 40]"""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for ffn in self.ffns:
            x = x + ffn(x)
        return self.head(x)


def test_kernels_run_the_experts_and_the_router_alone_tells_whom():
    torch.manual_seed(0)
    model = moec.compile(
        Small(), (IDS,), passes="+refactor-dense(width=16,steps=30),+hoist-routers", calib=TWO
    )
    assert [(b.name, b.experts, b.top_k) for b in model.blocks] == [
        ("ffns.0", 2, 1), ("ffns.1", 2, 1)
    ]  # fmt: skip
    assert [op.name for op in model.pass_results[-1].program.graph.ops].count("moe.gate") == 1
    chosen = model.routers(IDS)
    assert list(chosen) == ["ffns.0", "ffns.1"]
    assert torch.equal(model.routed(chosen, IDS), model(IDS))


def test_it_becomes_a_module_that_trains():
    torch.manual_seed(0)
    program = moec.transform(Small(), "+refactor-dense(width=16,steps=5)", (IDS,), calib=TWO)
    assert program.transformation.form == "graph"
    program(IDS).square().mean().backward()
    stacks = {
        n: p.grad for n, p in program.named_parameters() if n.startswith("ffns.") and p.ndim == 3
    }
    assert len(stacks) == 4
    assert all(grad is not None and bool(grad.any()) for grad in stacks.values())


class Saved(Small):
    """As a model of transformers, which has a configuration and can be saved."""

    config = SimpleNamespace(num_experts=2)

    def save_pretrained(self) -> None: ...


def test_a_dense_model_is_of_its_class_no_more():
    says = r"ffns\.0 was dense, and its class has no experts in this layer"
    with pytest.raises(UsageError, match=says):
        moec.transform(Saved(), "+refactor-dense(width=8,steps=1)", (IDS,), calib=TWO, form="class")
