"""Every form of attention becomes nn.attention; unsupported ones stay, with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moec.ir.graph import Graph, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.dense.fuse_attention import FuseAttention

HEAD = """\
graph main(q: f32[B, 4, S, 8], k: f32[B, 2, L, 8], v: f32[B, 2, L, 6], pad: f32[B, 1, 1, L], \
seen: bool[B, 1, 1, L], bias: f32[1, 4, S, L]; sinks: f32[1, 4, 1, 1], hidden: f32[]) {
  size B in [0, inf]
  size S in [0, inf]
  size L in [0, inf]
"""
TAIL = "  return y\n}\n"
REPEAT = (
    "  k5: f32[B, 2, 1, L, 8] = aten.reshape.default(k) <shape=({B}, 2, 1, {L}, 8)>\n"
    "  kx: f32[B, 2, 2, L, 8] = aten.expand.default(k5) <size=({B}, 2, 2, {L}, 8)>\n"
    "  k4: f32[B, 4, L, 8] = aten.reshape.default(kx) <shape=({B}, 4, {L}, 8)>\n"
    "  v5: f32[B, 2, 1, L, 6] = aten.reshape.default(v) <shape=({B}, 2, 1, {L}, 6)>\n"
    "  vx: f32[B, 2, 2, L, 6] = aten.expand.default(v5) <size=({B}, 2, 2, {L}, 6)>\n"
    "  v4: f32[B, 4, L, 6] = aten.reshape.default(vx) <shape=({B}, 4, {L}, 6)>\n"
)
PRODUCT = (
    REPEAT + "  kt: f32[B, 4, 8, L] = aten.permute.default(k4) <dims=(0, 1, 3, 2)>\n"
    "  dots: f32[B, 4, S, L] = aten.matmul.default(q, kt)\n"
)
SCALED = "  s: f32[B, 4, S, L] = aten.mul.Tensor(dots) <other=0.25>\n"
ADDED = "  m: f32[B, 4, S, L] = aten.add.Tensor(s, pad)\n"
SOFTMAX = "  w: f32[B, 4, S, L] = aten.softmax.int({}) <dim=-1>\n"
VALUES = "  y: f32[B, 4, S, 6] = aten.matmul.default(w, v4)\n"
SDPA = "  y: f32[B, 4, S, 6] = aten.scaled_dot_product_attention.default(q, k4, v4{}) <{}>\n"
SINKS = (
    "  column: f32[B, 4, S, 1] = aten.expand.default(sinks) <size=({B}, -1, {S}, -1)>\n"
    "  all: f32[B, 4, S, L + 1] = aten.cat.default(m, column) <tensors=($0, $1), dim=-1>\n"
    "  top: f32[B, 4, S, 1], place: i64[B, 4, S, 1] = aten.max.dim(all) <dim=-1, keepdim=true>\n"
    "  low: f32[B, 4, S, L + 1] = aten.sub.Tensor(all, top)\n"
    "  p: f32[B, 4, S, L + 1] = aten.softmax.int(low) <dim=-1, dtype=f32>\n"
    "  w: f32[B, 4, S, L] = aten.slice.Tensor(p) <dim=3, start=0, end=-1>\n"
)
FORMS = {
    "sdpa": REPEAT + SDPA.format("", "scale=0.25"),
    "sdpa_default_scale": REPEAT + SDPA.format("", "is_causal=true"),
    "sdpa_expanded_mask": REPEAT
    + "  mask: bool[B, 4, S, L] = aten.expand.default(seen) <size=({B}, 4, {S}, {L})>\n"
    + SDPA.format(", mask", "scale=0.25"),
    "sdpa_grouped_by_itself": SDPA.format("", "enable_gqa=true").replace("k4, v4", "k, v"),
    "eager": PRODUCT + SCALED + ADDED + SOFTMAX.format("m") + VALUES,
    "eager_sinks": PRODUCT + SCALED + ADDED + SINKS + VALUES,
    "eager_bias_and_mask": PRODUCT  # T5: no scale, a bias of positions and a mask
    + "  s: f32[B, 4, S, L] = aten.add.Tensor(dots, bias)\n"
    + ADDED
    + SOFTMAX.format("m")
    + VALUES,
    "eager_masked_fill": PRODUCT  # as people write it
    + "  s: f32[B, 4, S, L] = aten.div.Tensor(dots) <other=2.0>\n"
    + "  not: bool[B, 1, 1, L] = aten.logical_not.default(seen)\n"
    + "  m: f32[B, 4, S, L] = aten.where.self(not, hidden, s)\n"
    + SOFTMAX.format("m")
    + VALUES,
    "eager_where": PRODUCT
    + SCALED
    + "  m: f32[B, 4, S, L] = aten.where.self(seen, s, hidden)\n"
    + SOFTMAX.format("m")
    + VALUES,
    "eager_zero_bias": PRODUCT
    + SCALED
    + "  zero: f32[1, 4, S, L] = aten.full.default() <size=(1, 4, {S}, {L}), fill_value=0, "
    "dtype=f32>\n"
    + "  m: f32[B, 4, S, L] = aten.add.Tensor(s, zero)\n"
    + SOFTMAX.format("m")
    + VALUES,
}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {
        "sinks": torch.randn(1, 4, 1, 1).to(dtype),
        "hidden": torch.tensor(-torch.inf, dtype=dtype),
    }


def tensors(batch: int, queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(batch + queries + keys)
    visible = torch.rand(batch, 1, 1, keys) < 0.7
    visible[..., 0] = True
    return [
        torch.randn(batch, 4, queries, 8).to(dtype),
        torch.randn(batch, 2, keys, 8).to(dtype),
        torch.randn(batch, 2, keys, 6).to(dtype),
        torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype),
        visible,
        torch.randn(1, 4, queries, keys).to(dtype),
    ]


def fused(source: str) -> PassResult:
    return run(Program(parse(source), weights()), [FuseAttention()])[-1]


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


@pytest.mark.parametrize("form", FORMS)
def test_golden(form: str, golden: Callable[[str], None]) -> None:
    golden(print_graph(fused(HEAD + FORMS[form] + TAIL).program.graph))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_same_numbers(form: str, dtype: str) -> None:
    source = HEAD + FORMS[form] + TAIL
    source = source.replace("f32", dtype)
    step = fused(source)
    after = step.program.graph
    assert names(after).count("nn.attention") == 1
    assert not {"aten.softmax.int", "aten.matmul.default", "aten.expand.default"} & set(
        names(after)
    )
    torch_dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for batch, queries, keys in ((1, 1, 1), (2, 5, 9), (1, 7, 3), (0, 3, 3)):
        inputs = tensors(batch, queries, keys, torch_dtype)
        (want,) = evaluate(parse(source), inputs, weights(torch_dtype))
        (actual,) = evaluate(after, inputs, weights(torch_dtype))
        # float32: sums of up to 9 products of order 1 in another order. bf16: eager rounds
        # scores of up to about 8 to 8 bits, which moves a share by 2^-6 of itself.
        bound = 1e-6 if dtype == "f32" else 2**-5
        torch.testing.assert_close(actual, want, rtol=bound, atol=bound)


def test_casts_between_floats() -> None:
    """Llama's eager form: the softmax in float32, cast back."""
    source = HEAD + PRODUCT + SCALED + ADDED + SOFTMAX.format("m") + VALUES + TAIL
    source = source.replace("f32", "bf16").replace(
        "  w: bf16[B, 4, S, L] = aten.softmax.int(m) <dim=-1>\n",
        "  big: f32[B, 4, S, L] = aten.softmax.int(m) <dim=-1, dtype=f32>\n"
        "  w: bf16[B, 4, S, L] = aten._to_copy.default(big) <dtype=bf16>\n",
    )
    assert names(fused(source).program.graph) == ["nn.attention"]


def test_one_key_head_for_all() -> None:
    """Multi-query attention: [B, 1, L, D] expanded over the heads."""
    source = (
        "graph main(q: f32[B, 4, S, 8], k: f32[B, 1, S, 8]) {\n"
        "  size B in [0, inf]\n  size S in [0, inf]\n"
        "  k4: f32[B, 4, S, 8] = aten.expand.default(k) <size=({B}, 4, {S}, 8)>\n"
        "  y: f32[B, 4, S, 8] = aten.scaled_dot_product_attention.default(q, k4, k4)\n"
        "  return y\n}\n"
    )
    graph = fused(source).program.graph
    assert [v.name for v in graph.ops[-1].inputs] == ["q", "k", "k"]


@pytest.mark.parametrize(
    "repeat",
    [
        "  k4: f32[B, 4, S, 8] = aten.repeat.default(k) <repeats=(1, 2, 1, 1)>\n",
        "  k5: f32[B, 1, 2, S, 8] = aten.reshape.default(k) <shape=({B}, 1, 2, {S}, 8)>\n"
        "  kx: f32[B, 2, 2, S, 8] = aten.expand.default(k5) <size=({B}, 2, 2, {S}, 8)>\n"
        "  k4: f32[B, 4, S, 8] = aten.reshape.default(kx) <shape=({B}, 4, {S}, 8)>\n",
    ],
)
def test_heads_repeated_in_another_order_stay_repeated(repeat: str) -> None:
    """Heads 0 1 0 1, not the 0 0 1 1 of groups (JetMoE)."""
    source = (
        "graph main(q: f32[B, 4, S, 8], k: f32[B, 2, S, 8]) {\n"
        "  size B in [0, inf]\n  size S in [0, inf]\n"
        + repeat
        + "  y: f32[B, 4, S, 8] = aten.scaled_dot_product_attention.default(q, k4, k4)\n"
        "  return y\n}\n"
    )
    graph = fused(source).program.graph
    assert graph.ops[-1].inputs[1].shape[1] == 4
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    torch.testing.assert_close(evaluate(graph, [q, k]), evaluate(parse(source), [q, k]))


def test_values_with_heads_of_their_own() -> None:
    """Keys are shared by two heads, values by none: both stay as they are."""
    source = HEAD.replace("v: f32[B, 2,", "v4: f32[B, 4,") + REPEAT.split("  v5")[0]
    step = fused(source + SDPA.format("", "scale=0.25") + TAIL)
    assert not step.declined
    assert step.program.graph.ops[-1].inputs[1].name == "k4"


EAGER = PRODUCT + SCALED + ADDED + SOFTMAX.format("m") + VALUES


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            REPEAT + SDPA.format("", "dropout_p=0.1"),
            "has dropout, dropout_p=0.1",
        ),
        (
            PRODUCT + "  s: f32[B, 4, S, L] = aten.add.Tensor(dots, seen)\n"
            + SOFTMAX.format("s") + VALUES,
            "seen: bool[B, 1, 1, L] is added to the scores; a mask that is added has floats",
        ),
        (
            PRODUCT + "  s: f32[B, 4, S, L] = aten.add.Tensor(dots, pad)\n"
            + "  m: f32[B, 4, S, L] = aten.mul.Tensor(s) <other=0.5>\n"
            + SOFTMAX.format("m") + VALUES,
            "the scores are scaled after the mask was added",
        ),
        (
            PRODUCT + SCALED
            + "  low: f32[] = aten.scalar_tensor.default() <s=-100.0, dtype=f32>\n"
            + "  m: f32[B, 4, S, L] = aten.where.self(seen, s, low)\n"
            + SOFTMAX.format("m") + VALUES,
            "masked scores become -100.0, not -inf",
        ),
        (
            PRODUCT + SCALED + "  m: f32[B, 4, S, L] = aten.where.self(seen, s, pad)\n"
            + SOFTMAX.format("m") + VALUES,
            "masked scores become pad, not -inf",
        ),
        (
            PRODUCT + SCALED + "  n: f32[B, 4, S, L] = aten.where.self(seen, s, hidden)\n"
            + "  m: f32[B, 4, S, L] = aten.where.self(seen, n, hidden)\n"
            + SOFTMAX.format("m") + VALUES,
            "the scores have two bool masks",
        ),
        (
            PRODUCT + SCALED + "  n: f32[B, 4, S, L] = aten.where.self(seen, s, hidden)\n"
            + "  m: f32[B, 4, S, L] = aten.add.Tensor(n, bias)\n"
            + SOFTMAX.format("m") + VALUES,
            "the scores have a mask that is added and one that is bool",
        ),
        (
            PRODUCT + SCALED + ADDED + SINKS.replace("expand.default(sinks)", "neg.default(x)")
            + VALUES,
            "the column of sinks is f32[B, 4, S, 1], not one logit per head",
        ),
    ],
    ids=["dropout", "bool", "order", "finite", "tensor", "two", "mixed", "sinks"],
)  # fmt: skip
def test_declined(body: str, reason: str) -> None:
    if "neg.default(x)" in body:
        body = "  x: f32[B, 4, S, 1] = aten.slice.Tensor(q) <dim=3, start=0, end=1>\n" + body
    step = fused(HEAD + body + TAIL)
    assert [d.reason for d in step.declined] == [reason]
    assert "nn.attention" not in names(step.program.graph)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "graph main(q: f32[4, S, 8]) {\n  size S in [0, inf]\n"
            "  y: f32[4, S, 8] = aten.scaled_dot_product_attention.default(q, q, q)\n"
            "  return y\n}\n",
            "the queries are f32[4, S, 8]; attention is fused for [B, H, S, D]",
        ),
        (
            "graph main(q: f32[1, 1, S, D]) {\n  size S in [0, inf]\n  size D in [1, inf]\n"
            "  y: f32[1, 1, S, D] = aten.scaled_dot_product_attention.default(q, q, q)\n"
            "  return y\n}\n",
            "the scale depends on a size",
        ),
        (
            "graph main(q: f32[B, 1, S, 8], k: f32[1, 1, S, 8]) {\n"
            "  size B in [0, inf]\n  size S in [0, inf]\n"
            "  y: f32[B, 1, S, 8] = aten.scaled_dot_product_attention.default(q, k, k)\n"
            "  return y\n}\n",
            "nn.attention: k has another batch than q",
        ),
        (
            "graph main(q: f32[B, S, 4, 8]) {\n  size B in [0, inf]\n  size S in [0, inf]\n"
            "  y: f32[B, S, 4, 8] = aten.scaled_dot_product_attention.default(q, q, q)\n"
            "  return y\n}\n",
            "f32[B, S, 4, 8] has heads or features whose number varies",
        ),
        (
            HEAD.replace("bias: f32[1,", "bias: f32[B2,").replace("  size B ", "  size B2 ", 1)
            + PRODUCT
            + "  s: f32[B, 4, S, L] = aten.add.Tensor(dots, bias)\n"
            + ADDED
            + SOFTMAX.format("m")
            + VALUES
            + TAIL,
            "the masks f32[B2, 4, S, L] and f32[B, 1, 1, L] do not broadcast",
        ),
        (
            HEAD + EAGER.replace("y: f32", "y: f64") + TAIL,
            "gives f64[B, 4, S, 6] of queries f32[B, 4, S, 8]",
        ),
    ],
    ids=["rank", "scale", "batch", "heads", "broadcast", "dtype"],
)
def test_declined_types(source: str, reason: str) -> None:
    step = fused(source)
    assert [d.reason for d in step.declined] == [reason]
    assert "nn.attention" not in names(step.program.graph)


@pytest.mark.parametrize(
    "change",
    [
        ("softmax.int(m) <dim=-1>", "softmax.int(m) <dim=-2>"),  # over the queries
        ("aten.softmax.int(m) <dim=-1>", "aten.sigmoid.default(m)"),
        ("aten.mul.Tensor(dots) <other=0.25>", "aten.pow.Tensor_Scalar(dots) <exponent=2>"),
        ("<other=0.25>", "<other={S}>"),  # a scale that is a size
    ],
)
def test_not_attention(change: tuple[str, str]) -> None:
    step = fused(HEAD + EAGER.replace(*change) + TAIL)
    assert "nn.attention" not in names(step.program.graph)
    assert not step.declined
