"""Keys rotated as they are written to the cache; others stay, with a reason."""

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
from moec.passes.decode.fuse_append import FuseAppend
from moec.pipeline import choose, decode_passes
from moec.runtime.call.executor import Executor
from moec.target.cpu import host

STEP = """\
graph step(x: f32[B, S, 2, 8], cos: f32[B, 1, S, 8], sin: f32[B, 1, S, 8], first: i64[B], \
keys: f32[B, 2, L, 8]) {
  size B in [0, inf]
  size S in [1, inf]
  size L in [1, inf]
  t: f32[B, 2, S, 8] = aten.permute.default(x) <dims=(0, 2, 1, 3)> @ layer
  r: f32[B, 2, S, 8] = nn.rotary(t, cos, sin) @ layer
  after: f32[B, 2, L, 8] = nn.append(keys, r, first) @ layer
  y: f32[B, 2, L, 8] = aten.neg.default(after)
  state keys -> after
  return y
}
"""
HALF = STEP.replace("1, S, 8]", "1, S, 4]")
ALIKE = STEP.replace("cos: f32[B, 1, S, 8]", "cos: f32[1, 1, S, 8]").replace(
    "sin: f32[B, 1, S, 8]", "sin: f32[1, 1, S, 8]"
)
FORMS = {"whole": STEP, "half": HALF, "alike": ALIKE}
ROTARY = "nn.rotary(t, cos, sin)"


def fused(graph: Graph) -> PassResult:
    return run(Program(graph, {}), [FuseAppend()])[-1]


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


def tensors(text: str, batch: int, tokens: int, spare: int) -> dict[str, torch.Tensor]:
    sizes = {"B": batch, "S": tokens, "L": tokens + spare}
    result = {
        value.name: torch.randn([d if isinstance(d, int) else sizes[str(d)] for d in value.shape])
        for value in parse(text).inputs
    }
    return result | {"first": torch.randint(spare + 1, (batch,))}


@pytest.mark.parametrize("form", FORMS)
def test_golden(form: str, golden: Callable[[str], None]) -> None:
    golden(print_graph(fused(parse(FORMS[form])).program.graph))


@given(
    form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from(["f32", "bf16"]),
    batch=st.integers(0, 3),
    tokens=st.integers(1, 6),
    spare=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_means_the_same(
    form: str, dtype: str, batch: int, tokens: int, spare: int, seed: int
) -> None:
    text = FORMS[form].replace("f32", dtype)
    before = parse(text)
    after = fused(before).program.graph
    assert names(after) == ["nn.append", "aten.neg.default"]
    torch.manual_seed(seed)
    inputs = tensors(text, batch, tokens, spare)
    if dtype == "bf16":
        inputs = {name: t.bfloat16() if name != "first" else t for name, t in inputs.items()}
    given_ = [inputs[value.name] for value in before.inputs]
    assert torch.equal(evaluate(after, given_)[0], evaluate(before, given_)[0])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_gives_the_bits_of_two(form: str, dtype: str) -> None:
    """Also for rows that no vector holds whole, and infinities, whose sums are NaN."""
    text = FORMS[form].replace("8]", "40]").replace(", 4]", ", 20]").replace("f32", dtype)
    text = text.replace("[B", "[3").replace(" L,", " 9,")  # states have a known size
    text = text.replace("  size B in [0, inf]\n", "").replace("  size L in [1, inf]\n", "")
    before = parse(text)
    packages = [
        build(Module.of(Program(g, {})), host()) for g in (before, fused(before).program.graph)
    ]
    assert [name for _, name in packages[0].kernels] == ["append"]
    assert [name for _, name in packages[1].kernels] == ["turn_append"]
    torch.manual_seed(0)
    inputs = tensors(text, 3, 5, 4)
    inputs["first"] = torch.tensor([4, 0, 2])
    inputs["x"][0, 1, 1, 3] = inputs["x"][0, 1, 1, 23] = torch.inf
    if dtype == "bf16":
        inputs = {name: t.bfloat16() if name != "first" else t for name, t in inputs.items()}
    del inputs["keys"]
    want, actual = (Executor(package)(inputs)["y"] for package in packages)
    torch.testing.assert_close(actual, want, rtol=0, atol=0, equal_nan=True)
    assert torch.count_nonzero(want[1, :, 5:]) == 0


OTHER = "  other: f32[B, 2, S, 8] = aten.neg.default({}) @ layer.other\n  y:"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"  y:": OTHER.format("r"), "return y": "return y, other"},
            "r is also read by aten.neg.default at layer.other",
        ),
        (
            {"  y:": OTHER.format("t"), "return y": "return y, other"},
            "t is also read by aten.neg.default at layer.other",
        ),
        ({"return y": "return y, r"}, "r is also read by the caller"),
        (
            {ROTARY: f'{ROTARY} <pairs="neighbours">'},
            "the pairs of t are neighbouring features, and the cache kernel rotates halves",
        ),
        ({"f32": "f64"}, "t is f64, which the cache kernel cannot rotate"),
        (
            {"cos: f32": "cos: f64"},
            "cos is f64, which the cache kernel cannot rotate",
        ),
        (
            {
                "x: f32[B, S, 2, 8]": "x: f32[B, 2, S, 8]",
                "aten.permute.default(x) <dims=(0, 2, 1, 3)>": "aten.neg.default(x)",
            },
            "t is not a permutation of the layout",
        ),
    ],
)
def test_declines(changes: dict[str, str], reason: str) -> None:
    text = STEP
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    step = fused(parse(text))
    assert [declined.reason for declined in step.declined] == [reason]
    assert "nn.rotary" in names(step.program.graph)


def test_rows_where_tokens_stand_first_are_declined() -> None:
    text = STEP.replace("  t: f32[B, 2, S, 8] = aten.permute.default(x) <dims=(0, 2, 1, 3)>", "")
    text = (
        text.replace(" @ layer\n  r: f32[B, 2, S, 8]", "  r: f32[B, S, 2, 8]")
        .replace("(t, cos", "(x, cos")
        .replace("1, S, 8]", "S, 1, 8]")
        .replace("(keys, r, first)", "(keys, r, first) <tokens_first=true>")
    )
    step = fused(parse(text))
    (declined,) = step.declined
    assert declined.reason == "x is rotated in the layout [B, tokens, heads, features]"


def test_it_is_a_pass_of_the_step_that_can_be_left_out() -> None:
    assert decode_passes() == (FuseAppend(),)
    assert decode_passes(1) == decode_passes(2, "-fuse-append") == ()
    assert decode_passes(0, "+fuse-append") == (FuseAppend(),)
    assert FuseAppend() not in choose()
