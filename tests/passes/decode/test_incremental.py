"""Tokens in chunks: the decode step of a small causal model, and why other models have none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.backends.cpu.backend import CPU
from moec.codegen.lower import lower
from moec.errors import NoMatch
from moec.ir.graph import Module, Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.ops.dense.attention import OPERANDS
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import run
from moec.passes.decode import continues_text, incremental
from moec.passes.simplify.fold_permutes import FoldPermutes
from moec.target.cpu import host

HEAD = """\
graph main(input_ids: i64[B, S]; table: f32[9, 8], learned: f32[32, 8], w: f32[8, 8], \
gate: f32[4, 8], up: f32[4, 6, 8], down: f32[4, 8, 6], head: f32[9, 8]) {
  size B in [0, inf]
  size S in [1, 32]
  line: i64[S] = aten.arange.start_step() <start=0, end={S}> @ model
  places: f32[S, 8] = aten.embedding.default(learned, line) @ model.places
  e: f32[B, S, 8] = aten.embedding.default(table, input_ids) @ model.tokens
  x: f32[B, S, 8] = aten.add.Tensor(e, places) @ model
  q0: f32[B, S, 8] = aten.linear.default(x, w) @ model.q
  q1: f32[B, S, 2, 4] = aten.reshape.default(q0) <shape=({B}, {S}, 2, 4)> @ model
  q: f32[B, 2, S, 4] = aten.permute.default(q1) <dims=(0, 2, 1, 3)> @ model
"""
ATTENTION = """\
  y1: f32[B, 2, S, 4] = nn.attention(q, q, q) <scale=0.5, causal=true> @ model.attention
"""
TAIL = """\
  y2: f32[B, S, 2, 4] = aten.permute.default(y1) <dims=(0, 2, 1, 3)> @ model
  y3: f32[B, S, 8] = aten.reshape.default(y2) <shape=({B}, {S}, 8)> @ model
  z: f32[B, S, 8] = aten.add.Tensor(x, y3) @ model
  rows: f32[B*S, 8] = aten.reshape.default(z) <shape=({B*S}, 8)> @ model.moe
  weights: f32[B*S, 2], experts: i64[B*S, 2] = moe.gate(rows, gate) <k=2, compute=f32, logits=f32>
  order: i32[2*B*S], slots: i32[B*S, 2], ends: i32[4] = moe.sort(experts) <num_experts=4>
  h: f32[2*B*S, 6] = grouped.linear(rows, ends, up, order) <matrices=1, dtype=f32, gather=2> {
    graph body(a: f32[R, 6]) {
      s: f32[R, 6] = aten.silu.default(a)
      return s
    }
  }
  o: f32[2*B*S, 8] = grouped.linear(h, ends, down) <matrices=1, dtype=f32> @ model.moe
  c: f32[B*S, 8] = moe.combine(o, slots, weights) <k=2, tokens={B*S}, dtype=f32, weighted=true>
  f: f32[B, S, 8] = aten.reshape.default(c) <shape=({B}, {S}, 8)> @ model
  logits: f32[B, S, 9] = aten.linear.default(f, head) @ model.head
  return logits
}
"""


def program(text: str = HEAD + ATTENTION + TAIL) -> Program:
    graph = parse(text)
    generator = torch.Generator().manual_seed(0)
    return Program(
        graph,
        {p.name: torch.randn([int(d) for d in p.shape], generator=generator) for p in graph.params},
    )


def folded(full: Program) -> Program:
    """With queries, keys, values and results of attention where linear layers have them."""
    program = run(full, [FoldPermutes()], stage=Stage.GROUPED)[-1].program
    assert any(op.attrs.get("tokens_first") == OPERANDS for op in program.graph.ops)
    return program


def test_the_step_of_tokens_that_stand_first(golden: Callable[[str], None]) -> None:
    golden(print_graph(incremental(folded(program())).graph))


def test_no_kernel_moves_what_attention_reads_and_gives() -> None:
    """Neither in the whole nor in the step."""

    def permuting(full: Program) -> list[str]:
        module = lower(Module({"main": full, "decode": incremental(full)}), host(), CPU).module
        return [v.name_hint for v in module.get_global_vars() if "permute" in v.name_hint]

    assert permuting(program())
    assert not permuting(folded(program()))


def test_the_step(golden: Callable[[str], None]) -> None:
    golden(print_graph(incremental(program()).graph))


@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(0, 99),
    st.booleans(),
    st.integers(1, 5),
)
def test_pieces_give_what_the_whole_gives(
    batch: int, pieces: list[int], seed: int, fold: bool, most: int
) -> None:
    """Tolerance: sums over 8 features and 25 keys in another order."""
    full = folded(program()) if fold else program()
    step = incremental(full)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(9, (batch, sum(pieces)), generator=generator)
    (expected,) = evaluate(full.graph, [ids], full.weights)
    caches = [torch.full((batch, 2, 32, 4), 9.0) for _ in step.graph.states]  # anything at all
    done = 0
    for count in pieces:
        first, queries = torch.full((batch,), done), min(most, count)
        chosen = torch.arange(count - queries, count)
        rows = torch.arange(batch)[:, None] * count + chosen
        piece = [ids[:, done : done + count], first, rows, first + chosen[0]]
        logits, *caches = evaluate(step.graph, [*piece, *caches], step.weights)
        right, done = expected[:, done : done + count][:, chosen], done + count
        assert (logits - right).abs().max() <= 1e-5 * expected.abs().max()


ROUTER = "".join(TAIL.splitlines(keepends=True)[4:6])
FIRST = """\
  rows0: f32[B*S, 8] = aten.reshape.default(x) <shape=({B*S}, 8)> @ model.first
  h0: f32[2*B*S, 6] = grouped.linear(rows0, ends, up, order) <matrices=1, dtype=f32, gather=2>
  o0: f32[2*B*S, 8] = grouped.linear(h0, ends, down) <matrices=1, dtype=f32> @ model.first
  c0: f32[B*S, 8] = moe.combine(o0, slots, weights) <k=2, tokens={B*S}, dtype=f32, weighted=true>
  first: f32[B, S, 8] = aten.reshape.default(c0) <shape=({B}, {S}, 8)> @ model
"""
IDS = "  e0: f32[B*S, 8] = aten.reshape.default(e) <shape=({B*S}, 8)> @ model.router\n"
ONE_ROUTER = (
    HEAD.replace("  q0:", IDS + ROUTER.replace("(rows,", "(e0,") + FIRST + "  q0:").replace(
        "linear.default(x, w)", "linear.default(first, w)"
    )
    + ATTENTION
    + TAIL.replace(ROUTER, "")
)


@pytest.mark.parametrize("pieces", [[3], [1, 1], [4, 1, 2]])
def test_layers_before_and_after_the_last_cache_share_a_router(pieces: list[int]) -> None:
    """Only the last token of a piece runs through the layer after it: its rows are sorted alone.
    Tolerance: as above; weights are small, so that no softmax is so sharp that rounding moves it.
    """
    full = program(ONE_ROUTER)
    full = Program(full.graph, {name: t / 4 for name, t in full.weights.items()})
    step = incremental(full)
    ids = torch.randint(9, (2, sum(pieces)), generator=torch.Generator().manual_seed(0))
    (expected,) = evaluate(full.graph, [ids], full.weights)
    caches = [torch.zeros(2, 2, 32, 4) for _ in step.graph.states]
    done = 0
    for count in pieces:
        first = torch.full((2,), done)
        rows = (torch.arange(2) * count + count - 1)[:, None]
        piece = [ids[:, done : done + count], first, rows, first + count - 1]
        logits, *caches = evaluate(step.graph, [*piece, *caches], step.weights)
        done += count
        scale = expected.abs().max()
        assert (logits[:, 0] - expected[:, done - 1]).abs().max() <= 1e-5 * scale


def test_texts_may_stand_at_different_places() -> None:
    full = program()
    step = incremental(full)
    texts = [[1, 2, 3, 4, 5, 6], [7, 8, 2]]
    caches = [torch.zeros(2, 2, 32, 4) for _ in step.graph.states]
    ids = torch.tensor([[1, 2, 3, 4], [7, 8, 0, 0]])  # the second is padded
    first = torch.zeros(2, dtype=torch.int64)
    _, *caches = evaluate(
        step.graph,
        [ids, first, torch.tensor([[3], [5]]), torch.tensor([3, 1]), *caches],
        step.weights,
    )
    ids = torch.tensor([[5, 6], [2, 0]])
    logits, *_ = evaluate(
        step.graph,
        [ids, torch.tensor([4, 2]), torch.tensor([[1], [2]]), torch.tensor([5, 2]), *caches],
        step.weights,
    )
    for text, row in zip(texts, logits, strict=True):
        (expected,) = evaluate(full.graph, [torch.tensor([text])], full.weights)
        assert (row[0] - expected[0, -1]).abs().max() <= 1e-5 * expected.abs().max()


REFUSALS = {
    "attention_to_all": (
        ATTENTION.replace("causal=true", "causal=false"),
        "the attention at model.attention is not causal",
    ),
    "mask": (
        "  g: bool[B, S] = aten.ge.Scalar(input_ids) <other=1> @ model\n"
        "  m: bool[B, 1, 1, S] = aten.reshape.default(g) <shape=({B}, 1, 1, {S})> @ model\n"
        + ATTENTION.replace("(q, q, q) <", "(q, q, q, m) <masked=true, "),
        "the attention at model.attention has an unsupported mask, m",
    ),
    "sum_of_tokens": (
        "  t: f32[B, 2, 1, 4] = aten.sum.dim_IntList(q) <dim=(2), keepdim=true> @ model.mixer\n"
        "  q2: f32[B, 2, S, 4] = aten.add.Tensor(q, t) @ model.mixer\n"
        + ATTENTION.replace("q, q, q", "q2, q2, q2"),
        "aten.sum.dim_IntList at model.mixer mixes tokens",
    ),
    "running_sum": (
        "  q2: f32[B, 2, S, 4] = aten.cumsum.default(q) <dim=2> @ model.mixer\n"
        + ATTENTION.replace("q, q, q", "q2, q2, q2"),
        "aten.cumsum.default at model.mixer mixes tokens",
    ),
    "neighbours": (
        "  q2: f32[B, 2, S, 4] = aten.roll.default(q) <shifts=(1), dims=(2)> @ model.mixer\n"
        + ATTENTION.replace("q, q, q", "q2, q2, q2"),
        "aten.roll.default at model.mixer may mix tokens: no rule is known for this op",
    ),
    "products_of_tokens": (
        "  t: f32[B, 2, 4, S] = aten.permute.default(q) <dims=(0, 1, 3, 2)> @ model\n"
        "  d: f32[B, 2, S, S] = aten.matmul.default(q, t) @ model.attention\n"
        "  y1: f32[B, 2, S, 4] = aten.matmul.default(d, q) @ model.attention\n",
        "aten.matmul.default at model.attention mixes tokens",
    ),
    "no_attention": (
        "  y1: f32[B, 2, S, 4] = aten.relu.default(q) @ model\n",
        "no attention of the model was recognised",
    ),
    "places_that_begin_elsewhere": (
        ATTENTION + "  odd: i64[S - 1] = aten.arange.start_step() <start=1, end={S}> @ model.odd\n",
        "aten.arange.start_step at model.odd numbers tokens in another way than 0, 1, 2, …",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    middle, words = REFUSALS[name]
    with pytest.raises(NoMatch) as refused:
        incremental(program(HEAD + middle + TAIL))
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "<start=0, end={S}>",
            "<start=0, end={S}, step=2>",
            ("numbers tokens in another way than 0, 1"),
        ),
        (
            "input_ids: i64[B, S];",
            "input_ids: i64[B, S], extra: f32[B];",
            "the model takes input_ids, extra, not only token ids",
        ),
        ("input_ids: i64[B, S];", "input_ids: i64[B, 7];", "and not token ids i64[B, S] of any"),
    ],
)
def test_inputs_and_lines_that_are_refused(before: str, after: str, words: str) -> None:
    text = HEAD + ATTENTION + TAIL
    if "7" in after:
        text = text.replace("{S}", "7").replace("S]", "7]").replace("S, ", "7, ")
        text = text.replace("  size 7, [1, 32]\n", "").replace("  size S in [1, 32]\n", "")
        text = text.replace("*S", "*7").replace("S", "7")
    with pytest.raises(NoMatch) as refused:
        incremental(program(text.replace(before, after)))
    assert words in str(refused.value)


def test_places_that_are_spread_over_the_batch_behind_another_axis() -> None:
    """Positions [3, B, S] of three kinds, as models that also see have them."""
    spread = (
        "  p1: f32[1, 1, S, 8] = aten.reshape.default(places) <shape=(1, 1, {S}, 8)> @ model\n"
        "  p3: f32[3, B, S, 8] = aten.expand.default(p1) <size=(3, {B}, -1, -1)> @ model\n"
        "  p2: f32[B, S, 8] = aten.select.int(p3) <dim=0, index=2> @ model\n"
        "  x: f32[B, S, 8] = aten.add.Tensor(e, p2) @ model\n"
    )
    plain = "  x: f32[B, S, 8] = aten.add.Tensor(e, places) @ model\n"
    full = program((HEAD + ATTENTION + TAIL).replace(plain, spread))
    step = incremental(full)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    (expected,) = evaluate(full.graph, [ids], full.weights)
    caches = [torch.zeros(2, 2, 32, 4) for _ in step.graph.states]
    for position in range(3):
        at = torch.full((2,), position)
        given_ = [ids[:, position : position + 1], at, torch.arange(2)[:, None], at]
        logits, *caches = evaluate(step.graph, [*given_, *caches], step.weights)
        reference = expected[:, position]
        assert (logits[:, 0] - reference).abs().max() <= 1e-5 * expected.abs().max()


CARRIED = (
    "  u0: f32[B, 8, S] = aten.permute.default(x) <dims=(0, 2, 1)> @ model.conv\n"
    "  u1: f32[B, 8, S + 2] = aten.convolution.default(u0, taps) <bias=none, stride=(1), "
    "padding=(2), dilation=(1), transposed=false, output_padding=(0), groups=8> @ model.conv\n"
    "  u2: f32[B, 8, S] = aten.slice.Tensor(u1) <dim=2, end={S}> @ model.conv\n"
    "  u3: f32[B, S, 8] = aten.permute.default(u2) <dims=(0, 2, 1)> @ model\n"
    "  u: f32[B, S, 2, 4] = aten.reshape.default(u3) <shape=({B}, {S}, 2, 4)> @ model\n"
    "  decay: f32[B, S, 2] = aten.amin.default(u) <dim=(-1)> @ model\n"
    "  r: f32[B, S, 2, 4], end: f32[B, 2, 4, 4] = nn.linear_attention(u, u, u, decay) @ model.mix\n"
    "  y1: f32[B, 2, S, 4] = aten.permute.default(r) <dims=(0, 2, 1, 3)> @ model\n"
)


def carrying(text: str = CARRIED) -> Program:
    changed = program(
        (HEAD + text + TAIL).replace("head: f32[9, 8]", "head: f32[9, 8], taps: f32[8, 1, 3]")
    )
    # Small numbers: what is carried grows with exp(decay).
    return Program(changed.graph, {name: 0.3 * value for name, value in changed.weights.items()})


def test_what_is_carried(golden: Callable[[str], None]) -> None:
    golden(print_graph(incremental(carrying()).graph))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_state_goes_on_where_the_piece_before_ended(pieces: list[int]) -> None:
    """Tolerance: float32 sums in another order; errors in the state may grow over 20 tokens."""
    full = carrying()
    step = incremental(full)
    ids = torch.arange(2 * sum(pieces)).reshape(2, -1) % 9
    (expected,) = evaluate(full.graph, [ids], full.weights)
    states = [torch.zeros(2, *map(int, state.before.shape[1:])) for state in step.graph.states]
    done = 0
    for count in pieces:
        first = torch.full((2,), done)
        rows = (torch.arange(2) * count + count - 1)[:, None]
        piece = [ids[:, done : done + count], first, rows, first + count - 1]
        logits, *states = evaluate(step.graph, [*piece, *states], step.weights)
        done += count
        scale = expected.abs().max()
        assert (logits[:, 0] - expected[:, done - 1]).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("padding=(2)", "padding=(1)", "the convolution at model.conv is not causal"),
        (
            "<dim=2, end={S}>",
            "<dim=2, start=2, end={S + 2}>",
            "the convolution at model.conv is not",
        ),
        (
            "(u, u, u, decay) @",
            "(u, u, u, decay, began) <started=true> @",
            "the linear attention at model.mix starts from a state of the model itself",
        ),
    ],
)
def test_states_that_are_refused(before: str, after: str, words: str) -> None:
    text = CARRIED.replace(before, after)
    if "began" in after:
        size = "<size=({B}, 2, 4, 4), fill_value=0.0, dtype=f32>"
        text = f"  began: f32[B, 2, 4, 4] = aten.full.default() {size} @ model\n{text}"
    with pytest.raises(NoMatch, match=words):
        incremental(carrying(text))


def test_which_graphs_continue_text() -> None:
    assert continues_text(program().graph)
    assert not continues_text(parse("graph main(x: f32[T, 4]) {\n  return x\n}\n"))
