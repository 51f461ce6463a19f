"""Permutations around attention become its layout; those with other readers stay, with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.package import build
from moec.ir.graph import Graph, Module, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.simplify.fold_permutes import FoldPermutes
from moec.runtime.call.executor import Executor
from moec.target.cpu import host

LAYER = """\
graph main(q: f32[B, S, 4, 8], k: f32[B, S, 2, 8], v: f32[B, S, 2, 6], mask: f32[B, 1, S, S]) {
  size B in [0, inf]
  size S in [0, inf]
  qh: f32[B, 4, S, 8] = aten.permute.default(q) <dims=(0, 2, 1, 3)> @ layer
  kh: f32[B, 2, S, 8] = aten.permute.default(k) <dims=(0, 2, 1, 3)> @ layer
  vh: f32[B, 2, S, 6] = aten.permute.default(v) <dims=(0, 2, 1, 3)> @ layer
  yh: f32[B, 4, S, 6] = nn.attention(qh, kh, vh) <scale=0.3, causal=true> @ layer.attention
  y: f32[B, S, 4, 6] = aten.permute.default(yh) <dims=(0, 2, 1, 3)> @ layer
  z: f32[B, S, 24] = aten.reshape.default(y) <shape=({B}, {S}, 24)> @ layer
  return z
}
"""
MASKED = LAYER.replace("(qh, kh, vh) <", "(qh, kh, vh, mask) <masked=true, ")
TURNED = LAYER.replace(
    "  yh:", "  turned: f32[B, 2, S, 8] = aten.neg.default(kh) @ layer\n  yh:"
).replace("(qh, kh, vh)", "(qh, turned, vh)")
SELF = LAYER.replace("(qh, kh, vh)", "(qh, qh, qh)").replace(", 6]", ", 8]").replace("24", "32")
FORMS = {"plain": LAYER, "masked": MASKED, "turned": TURNED, "self": SELF}


def folded(graph: Graph, fuel: int | None = None) -> PassResult:
    return run(Program(graph, {}), [FoldPermutes()], fuel=fuel)[-1]


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


def tensors(text: str, batch: int, length: int) -> list[torch.Tensor]:
    sizes = {"B": batch, "S": length}
    return [
        torch.randn([d if isinstance(d, int) else sizes[str(d)] for d in value.shape])
        for value in parse(text).inputs
    ]


@pytest.mark.parametrize("form", FORMS)
def test_golden(form: str, golden: Callable[[str], None]) -> None:
    golden(print_graph(folded(parse(FORMS[form])).program.graph))


@given(
    form=st.sampled_from(sorted(FORMS)),
    batch=st.integers(0, 3),
    length=st.integers(0, 9),
    fuel=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_means_the_same(form: str, batch: int, length: int, fuel: int, seed: int) -> None:
    """Also halfway, where some of it is folded alone. No bit differs."""
    before = parse(FORMS[form])
    after = folded(before, fuel).program.graph
    torch.manual_seed(seed)
    inputs = tensors(FORMS[form], batch, length)
    assert torch.equal(evaluate(after, inputs)[0], evaluate(before, inputs)[0])


@pytest.mark.parametrize("length", [3, 70])
@pytest.mark.parametrize("form", ["plain", "masked", "turned"])
def test_the_kernels_give_the_same_bits(form: str, length: int) -> None:
    before = parse(FORMS[form])
    after = folded(before).program.graph
    torch.manual_seed(length)
    inputs = dict(zip(("q", "k", "v", "mask"), tensors(LAYER, 2, length), strict=True))
    want, actual = (
        Executor(build(Module.of(Program(g, {})), host()))(inputs) for g in (before, after)
    )
    (one,), (other,) = want.values(), actual.values()
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_what_was_folded_is_not_folded_again() -> None:
    once = folded(parse(LAYER)).program.graph
    assert names(once) == ["nn.attention", "aten.reshape.default"]
    assert folded(once).rewrites == 0


def test_a_permutation_of_what_has_tokens_first_gives_heads_first() -> None:
    once = print_graph(folded(parse(LAYER)).program.graph)
    again = once.replace("nn.attention(q, k, v)", "nn.attention(q, w, v)").replace(
        "  yh", "  w: f32[B, S, 2, 8] = aten.permute.default(heads) <dims=(0, 2, 1, 3)>\n  yh"
    )
    again = again.replace("k: f32[B, S, 2, 8]", "heads: f32[B, 2, S, 8]")
    graph = folded(parse(again)).program.graph
    assert graph.ops[0].attrs["tokens_first"] == ("q", "v", "out")
    assert graph.ops[0].inputs[1].name == "heads"


OTHER = "  other: f32[B, 2, S, 8] = aten.neg.default(kh) @ layer.other\n"


@pytest.mark.parametrize(
    ("old", "new", "reason", "layout"),
    [
        (
            "  return z",
            OTHER + "  return z, other",
            "kh is also read by aten.neg.default at layer.other",
            ("q", "v", "out"),
        ),
        ("return z", "return z, vh", "vh is also read by the caller", ("q", "k", "out")),
        ("return z", "return z, yh", "yh is also read by the caller", ("q", "k", "v")),
        (
            "  return z",
            "  most: f32[B, 4, S] = aten.amax.default(yh) <dim=(-1)> @ layer.most\n"
            "  return z, most",
            "yh is also read by aten.amax.default at layer.most",
            ("q", "k", "v"),
        ),
    ],
)
def test_what_others_read_too_stays(
    old: str, new: str, reason: str, layout: tuple[str, ...]
) -> None:
    step = folded(parse(LAYER.replace(old, new)))
    assert [declined.reason for declined in step.declined] == [reason]
    (attention,) = [op for op in step.program.graph.ops if op.name == "nn.attention"]
    assert attention.attrs["tokens_first"] == layout


def test_other_permutations_stay() -> None:
    text = LAYER.replace("q: f32[B, S, 4, 8]", "q: f32[S, B, 4, 8]").replace(
        "permute.default(q) <dims=(0, 2, 1, 3)>", "permute.default(q) <dims=(1, 2, 0, 3)>"
    )
    graph = folded(parse(text)).program.graph
    assert names(graph)[0] == "aten.permute.default"
    assert graph.ops[1].attrs["tokens_first"] == ("k", "v", "out")


SHARED = """\
graph main(q: f32[B, 4, S, 8], k: f32[B, S, 2, 8]) {
  size B in [0, inf]
  size S in [0, inf]
  kh: f32[B, 2, S, 8] = aten.permute.default(k) <dims=(0, 2, 1, 3)>
  y: f32[B, 4, S, 8] = nn.attention(q, kh, kh) <scale=0.3, causal=true>
  z: f32[B, 4, S, 8] = nn.attention(y, kh, kh) <scale=0.3, causal=true, window=3>
  return z
}
"""


def test_keys_that_layers_share() -> None:
    graph = folded(parse(SHARED)).program.graph
    assert names(graph) == ["nn.attention", "nn.attention"]
    assert [op.attrs["tokens_first"] for op in graph.ops] == [("k", "v"), ("k", "v")]
