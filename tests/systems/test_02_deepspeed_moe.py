"""DeepSpeed-MoE: a gate of einsums over [S, E, C] becomes a table of choices, a scan for slots, a
sort and a gather; random token selection reads its numbers from an input."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import moec
from docs.systems import COMPARABLE, Figure, Source
from moec import CompiledModel
from moec.errors import UnsupportedError
from moec.ir.graph import Program, Value
from moec.ir.interpret.ranks import evaluate_ranks
from moec.ir.sizes.dims import symbols
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.plan.groups import groups_of
from moec.plan.inputs.workload import Workload
from moec.plan.network.exchange import Form, coordinated, flat, hierarchical
from moec.plan.plan import LayerPlan, Plan
from tests.systems.records import Keep, load, record_of

example = load("02_deepspeed_moe")
SOURCE = Source(
    number=2,
    title="DeepSpeed-MoE",
    paper="2201.05596",
    example="02_deepspeed_moe",
    process="autoregressive",
    modalities=("text",),
    adds="Dispatch and combine einsums over [S, E, C] become a table of choices, a scan for slots, "
    "and gathers of rows; numbers of random token selection are an input. The planner chooses "
    "among flat, hierarchical and coordinated exchanges (`moec.plan`); the example has the staged "
    "distillation.",
    trained="random tokens",
)
# float32, sums of at most 64 terms in another order, through two layers.
TOLERANCE = 1e-5
LAYERS = {1: "random token selection", 2: "top-2"}


@functools.cache
def compiled() -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, inputs = example.small()
    return model, moec.compile(model, inputs, kv_cache=False, verify=False)


@functools.cache
def layer(top_k: int) -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, inputs = example.one_layer(top_k)
    return model, moec.compile(model, inputs, verify=False)


def test_a_top_1_gate_keeps_the_tokens_of_the_greatest_numbers() -> None:
    """Two of three tokens fit; their slots are in the order of the text, and they weigh p."""
    combine = example.top1_gate(
        torch.tensor([[1.0, 0.0]] * 3), 2, torch.tensor([[0.1, 0.0], [0.9, 0.0], [0.5, 0.0]])
    )
    assert combine.nonzero().tolist() == [[1, 0, 0], [2, 0, 1]]
    torch.testing.assert_close(combine.sum((1, 2))[1:], torch.ones(2).sigmoid())


def test_second_choices_take_the_slots_after_all_first_ones() -> None:
    """Token 0 chooses expert 1, then 0; tokens 1 and 2 the reverse. Where the second choice does
    not fit, the first one weighs 1."""
    logits = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    combine = example.top2_gate(logits, 3)
    assert combine.nonzero().tolist() == [
        [0, 0, 2], [0, 1, 0], [1, 0, 0], [1, 1, 1], [2, 0, 1], [2, 1, 2],
    ]  # fmt: skip
    first, second = torch.tensor([1.0, -1.0]).sigmoid()
    torch.testing.assert_close(combine[1].sum(-1)[:2], torch.stack((first, second)))
    combine = example.top2_gate(logits, 2)
    assert combine.nonzero().tolist() == [[0, 1, 0], [1, 0, 0], [1, 1, 1], [2, 0, 1]]
    torch.testing.assert_close(combine[[0, 2], [1, 0]].sum(-1), torch.ones(2))


def has_places(value: Value) -> bool:
    """Whether it has an axis for the places of each expert beside one of the tokens."""
    dims = [d for d in value.shape if "Max" in str(d)]
    return bool(dims) and any(symbols(d) for d in value.shape if d not in dims)


def check_ops(model: CompiledModel) -> set[str]:
    ops = model.graph.ops
    assert not [v for op in ops for v in op.outputs if has_places(v)]
    return {op.name for op in ops if op.name.startswith("moe.")}


def test_the_einsum_gate_becomes_tables() -> None:
    _, ours = compiled()
    assert [(b.experts, b.top_k) for b in ours.blocks] == [(4, 1)]
    assert ours.blocks[0].router.startswith("softmax, top-1, at most")
    assert check_ops(ours) == {"moe.gate", "moe.capacity", "moe.sort", "moe.combine"}


def test_equal_to_eager_where_experts_overflow() -> None:
    model, ours = compiled()
    for shape in ((1, 1), (3, 16)):
        ids = torch.randint(example.SMALL.vocabulary, shape)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), model(ids), rtol=TOLERANCE, atol=TOLERANCE)
    same = torch.full((2, 16), 7)  # equal tokens choose alike, up to their dims
    with torch.no_grad():
        torch.testing.assert_close(ours(same), model(same), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("top_k", LAYERS, ids=LAYERS.values())
def test_layers_that_drop_choices(top_k: int) -> None:
    """All tokens are alike: each expert chosen takes C = 10 of 40 or 20 of 40, others give zero."""
    model, ours = layer(top_k)
    assert [(b.experts, b.top_k) for b in ours.blocks] == [(4, top_k)]
    assert {"moe.sort", "moe.combine"} <= check_ops(ours)
    x = torch.randn(1, 1, example.SMALL.width).expand(1, 40, -1).contiguous()
    for seed in range(2):
        numbers = torch.rand(40, 4, generator=torch.Generator().manual_seed(seed))
        inputs = (x, numbers) if top_k == 1 else (x,)
        with torch.no_grad():
            expected = model(*inputs)
        output = ours(*inputs)
        torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
        rows = output.flatten(0, 1).abs().sum(-1).nonzero()[:, 0]
        assert len(rows) == 10 * top_k
        if top_k == 1:
            chosen = int(model.gate(x[0, 0]).argmax())
            assert rows.tolist() == numbers[:, chosen].topk(10).indices.sort().values.tolist()


@pytest.mark.parametrize(("ranks", "node", "slices"), [(128, 8, 8), (64, 8, 4)])
def test_hops_of_the_exchanges(ranks: int, node: int, slices: int) -> None:
    """The paper's O(p), O(G + p/G) and O(p/L), where it counts a rank's message to itself."""
    assert flat(ranks, node, 1.0).published_hops == ranks
    two = hierarchical(ranks, node, 1.0)
    assert (two.hops_inside + 1) + (two.hops_across + 1) == node + ranks // node
    assert coordinated(ranks, node, slices, 1.0).published_hops == ranks // slices


FORMS: dict[Form, int] = {"flat": 1, "hierarchical": 1, "coordinated": 2}
"""The slices of an expert, with eight ranks in nodes of four."""


@functools.cache
def recognised(top_k: int, random: bool) -> tuple[nn.Module, Program]:
    """An MoE layer and its graph with experts, before it is lowered."""
    torch.manual_seed(0)
    module = example.MoE(replace(example.SMALL, top_k=top_k, factor=1.0), 4).eval()
    inputs = (torch.randn(1, 33, example.SMALL.width), torch.rand(33, 4))[: 1 + random]
    passes = moec.compile(module, inputs, verify=False, build=False).pass_results
    programs = [step.program for step in passes]
    return module, [p for p in programs if any(o.name == "moe.experts" for o in p.graph.ops)][-1]


def planned(form: Form) -> Plan:
    slices = FORMS[form]
    ranks = 8 // slices
    layer = LayerPlan(layer=0, experts=4, attention=1, ranks=ranks, slices=slices, form=form,
                      slots=tuple((rank % 4,) for rank in range(ranks)), seconds={})  # fmt: skip
    return Plan(model="", cluster="", devices=8, node_size=4, routing="", layers=(layer,),
                workload=Workload(tokens=1, sequences=0, context=0),
                seconds=0.0, memory=0.0, memory_limit=0.0)  # fmt: skip


@pytest.mark.parametrize(
    ("form", "published"), [("flat", 8), ("hierarchical", 6), ("coordinated", 4)]
)
def test_ranks_exchange_rows_in_as_many_hops(form: Form, published: int) -> None:
    """p, G + p/G and p/L for p = 8, G = 4, L = 2, counting a rank's message to itself once in each
    group. All tokens are alike, so that the capacity, which is that of all ranks, binds."""
    module, program = recognised(1, random=False)
    plan, counts = planned(form), [5, 0, 7, 1, 4, 9, 3, 11]
    groups = groups_of(plan)
    programs = rank_programs(program, plan)
    x = torch.randn(1, 1, example.SMALL.width).expand(1, sum(counts), -1).contiguous()
    results = evaluate_ranks(programs, [[part] for part in x.split(counts, 1)], groups)
    with torch.no_grad():
        expected = module(x)
    output = torch.cat([result for (result,) in results], 1)
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert int((expected.abs().sum(-1) > 0).sum()) == 10  # 40 / 4
    sends = {
        str(op.attrs["group"])
        for op in programs["rank.0.main"].graph.ops
        if op.name == "dist.all_to_all"
    }
    assert sum(len(groups[name][0]) for name in sends) == published


@pytest.mark.parametrize("top_k", LAYERS, ids=LAYERS.values())
def test_weights_that_depend_on_other_tokens_are_not_for_ranks(top_k: int) -> None:
    _, program = recognised(top_k, random=top_k == 1)
    with pytest.raises(UnsupportedError, match=r"aten\.cumsum.* over the tokens of one rank"):
        rank_programs(program, planned("flat"))


def test_a_student_of_fewer_layers_learns() -> None:
    torch.manual_seed(0)
    ids = torch.randint(example.SMALL.vocabulary, (4, 12))
    teacher = example.GPT(replace(example.SMALL, layers=4, experts=(2, 4)))
    assert [len(b.ffn.moe.experts) for b in teacher.blocks if b.routed] == [2, 4]
    losses = example.distill(example.GPT(example.SMALL), teacher, ids, steps=60, stop=30)
    assert losses[30] < losses[0]
    assert losses[-1] < 0.6 * losses[30]


@pytest.mark.parametrize("name", example.PUBLISHED)
def test_published_sizes(name: str) -> None:
    """The paper rounds to billions."""
    total, _ = example.published(name)
    assert abs(total / 1e9 - example.PUBLISHED[name][1]) <= 0.5


def test_record(keep: Keep) -> None:
    figures = []
    for name, (_, paper) in example.PUBLISHED.items():
        total, active = example.published(name)
        ours = f"{total / 1e9:.1f}B, {active / 1e9:.2f}B active"
        figures.append(Figure(f"parameters of {name}", ours, f"{paper:g}B", COMPARABLE))
    keep(record_of(compiled()[1], SOURCE, f"{TOLERANCE:g}", figures))
