"""Each form of rotary embedding becomes nn.rotary; look-alikes stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moec.ir.graph import Graph, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.dense.fuse_rotary import FuseRotary

HEAD = """\
graph main(x: f32[B, 4, S, 8], z: f32[B, 4, S, 8], flat: f32[B, S, 32], cos: f32[1, 1, S, {w}], \
sin: f32[1, 1, S, {w}], angle: f32[1, S, 4]) {{
  size B in [0, inf]
  size S in [0, inf]
"""
TAIL = "  return y\n}\n"
HALVES = (
    "  a: f32[B, 4, S, 4] = aten.slice.Tensor(x) <dim=3, start=0, end=4>\n"
    "  b: f32[B, 4, S, 4] = aten.slice.Tensor(x) <dim=3, start=4, end=9223372036854775807>\n"
)
SPLIT = (
    "  a: f32[B, 4, S, 4], b: f32[B, 4, S, 4] = aten.split_with_sizes.default(x) "
    "<split_sizes=(4, 4), dim=-1>\n"
)
NEIGHBOURS = (
    "  a: f32[B, 4, S, 4] = aten.slice.Tensor(x) <dim=3, start=0, end=9223372036854775807, "
    "step=2>\n"
    "  b: f32[B, 4, S, 4] = aten.slice.Tensor(x) <dim=3, start=1, end=9223372036854775807, "
    "step=2>\n"
)
LLAMA = (
    HALVES + "  plain: f32[B, 4, S, 8] = aten.mul.Tensor(x, cos)\n"
    "  minus: f32[B, 4, S, 4] = aten.neg.default(b)\n"
    "  turned: f32[B, 4, S, 8] = aten.cat.default(minus, a) <tensors=($0, $1), dim=-1>\n"
    "  part: f32[B, 4, S, 8] = aten.mul.Tensor(turned, sin)\n"
    "  y: f32[B, 4, S, 8] = aten.add.Tensor(plain, part)\n"
)
CROSS = (
    "  ac: f32[B, 4, S, 4] = aten.mul.Tensor(a, cos)\n"
    "  bs: f32[B, 4, S, 4] = aten.mul.Tensor(b, sin)\n"
    "  first: f32[B, 4, S, 4] = aten.sub.Tensor(ac, bs)\n"
    "  bc: f32[B, 4, S, 4] = aten.mul.Tensor(b, cos)\n"
    "  as: f32[B, 4, S, 4] = aten.mul.Tensor(a, sin)\n"
    "  second: f32[B, 4, S, 4] = aten.add.Tensor(bc, as)\n"
    "  y: f32[B, 4, S, 8] = aten.cat.default(first, second) <tensors=($0, $1), dim=-1>\n"
)
POLAR = (
    "  one: f32[1, S, 4] = aten.full_like.default(angle) <fill_value=1>\n"
    "  round: c64[1, S, 4] = aten.polar.default(one, angle)\n"
    "  turns: c64[1, S, 4] = aten.mul.Tensor(round) <other=1.5>\n"
)
COMPLEX = (
    "  pairs: f32[B, S, 4, 4, 2] = aten.reshape.default(flat) <shape=({B}, {S}, 4, 4, 2)>\n"
    "  c: c64[B, S, 4, 4] = aten.view_as_complex.default(pairs)\n"
    "  t: c64[1, S, 1, 4] = aten.reshape.default(turns) <shape=(1, {S}, 1, 4)>\n"
    "  ct: c64[B, S, 4, 4] = aten.mul.Tensor(c, t)\n"
    "  real: f32[B, S, 4, 4, 2] = aten.view_as_real.default(ct)\n"
)
OUT = "  y: f32[B, S, 4, 8] = aten.reshape.default(real) <shape=({B}, {S}, 4, 8)>\n"
FORMS: dict[str, tuple[int, str]] = {
    "llama": (8, LLAMA),
    "llama_other_order": (
        8,
        LLAMA.replace("(plain, part)", "(part, plain)").replace("(turned, sin)", "(sin, turned)"),
    ),
    "gpt_oss": (4, SPLIT + CROSS),
    "deepseek_v3": (4, NEIGHBOURS + CROSS),
    "complex": (4, POLAR + COMPLEX + OUT),
    "complex_flat": (
        4,
        POLAR + COMPLEX + OUT.replace("4, 8]", "32]").replace("4, 8)", "32)"),
    ),
    "complex_of_another_radius": (
        4,
        POLAR.replace("<fill_value=1>", "<fill_value=2>") + COMPLEX + OUT,
    ),
}


def fused(form: tuple[int, str]) -> PassResult:
    return run(Program(parse(source(form)), {}), [FuseRotary()])[-1]


def source(form: tuple[int, str]) -> str:
    return HEAD.format(w=form[0]) + form[1] + TAIL


def tensors(width: int, batch: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(length)
    angle = torch.rand(1, length, 4) * 50
    turns = [f(angle).repeat(1, 1, width // 4)[:, None] * 1.25 for f in (torch.cos, torch.sin)]
    x, z = torch.randn(2, batch, 4, length, 8)
    inputs = [x, z, torch.randn(batch, length, 32), *turns, angle]
    return [tensor.to(dtype) for tensor in inputs]


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


@pytest.mark.parametrize("form", FORMS)
def test_golden(form: str, golden: Callable[[str], None]) -> None:
    golden(print_graph(fused(FORMS[form]).program.graph))


@pytest.mark.parametrize("form", FORMS)
def test_same_numbers(form: str) -> None:
    graph = fused(FORMS[form]).program.graph
    assert names(graph).count("nn.rotary") == 1
    assert not {"aten.cat.default", "aten.view_as_complex.default"} & set(names(graph))
    for batch, length in ((1, 1), (2, 5), (0, 3)):
        inputs = tensors(FORMS[form][0], batch, length, torch.float32)
        want = evaluate(parse(source(FORMS[form])), inputs)
        # The same two products and one sum; complex multiplication may fuse one of them.
        torch.testing.assert_close(evaluate(graph, inputs), want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("form", ["llama", "gpt_oss", "deepseek_v3"])
def test_half_types(form: str) -> None:
    text = source(FORMS[form]).replace("f32", "bf16")
    graph = run(Program(parse(text), {}), [FuseRotary()])[-1].program.graph
    inputs = tensors(FORMS[form][0], 2, 9, torch.bfloat16)
    # Two products of up to 4 * 1.25 rounded to 8 bits, and their sum.
    torch.testing.assert_close(
        evaluate(graph, inputs), evaluate(parse(text), inputs), rtol=2**-7, atol=5 * 2**-8
    )


def test_casts_belong_to_the_op() -> None:
    body = LLAMA.replace("(x", "(full")
    body = "  full: f32[B, 4, S, 8] = aten._to_copy.default(x) <dtype=f32>\n" + body
    body = body.replace("  y: f32", "  big: f32")
    body += "  y: bf16[B, 4, S, 8] = aten._to_copy.default(big) <dtype=bf16>\n"
    text = source((8, body)).replace("x: f32", "x: bf16")
    graph = run(Program(parse(text), {}), [FuseRotary()])[-1].program.graph
    assert names(graph) == ["nn.rotary"]
    inputs = tensors(8, 2, 3, torch.float32)
    inputs[0] = inputs[0].bfloat16()
    assert torch.equal(evaluate(graph, inputs)[0], evaluate(parse(text), inputs)[0])


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (
            (8, LLAMA.replace("aten.mul.Tensor(x, cos)", "aten.mul.Tensor(z, cos)")),
            "rotates the halves of x, but adds z by cos",
        ),
        (
            (4, SPLIT + CROSS.replace("(b, cos)", "(b, sin)")),
            "the two halves are rotated by different angles",
        ),
        (
            (8, LLAMA.replace("part: f32", "part: f64").replace("y: f32", "y: f64")),
            "rotates f32[B, 4, S, 8] into f64[B, 4, S, 8]",
        ),
    ],
    ids=["other", "angles", "dtype"],
)
def test_declined(form: tuple[int, str], reason: str) -> None:
    step = fused(form)
    assert [d.reason for d in step.declined] == [reason]
    assert "nn.rotary" not in names(step.program.graph)


def test_declined_by_the_type_rule() -> None:
    """A cos for every feature pair of another batch."""
    text = source(FORMS["llama"]).replace("cos: f32[1, 1,", "cos: f32[C, 1,")
    text = text.replace("  size B ", "  size C in [0, inf]\n  size B ")
    step = run(Program(parse(text), {}), [FuseRotary()])[-1]
    assert "cos: f32[C, 1, S, 8] is not for x" in step.declined[0].reason


@pytest.mark.parametrize(
    "form",
    [
        (8, LLAMA.replace("aten.neg.default(b)", "aten.abs.default(b)")),
        (8, LLAMA.replace("aten.neg.default(b)", "aten.neg.default(a)")),  # both the first half
        (8, LLAMA.replace("start=0, end=4", "start=1, end=5")),
        (8, LLAMA.replace("(x) <dim=3, start=4", "(z) <dim=3, start=4")),  # halves of two values
        (8, LLAMA.replace("(x) <dim=3, start=0", "(z) <dim=3, start=0").replace("(x, c", "(z, c")),
        (4, SPLIT.replace(", b:", ", c:") + NEIGHBOURS.split("\n")[1] + "\n" + CROSS),
        (4, HALVES.replace("(x) <dim=3, start=4", "(z) <dim=3, start=4") + CROSS),
        (4, SPLIT + CROSS.replace("cat.default(first, second)", "cat.default(second, first)")),
        (4, SPLIT + CROSS.replace("sub.Tensor(ac, bs)", "sub.Tensor(bs, ac)")),
        (4, SPLIT + CROSS.replace("<tensors=($0, $1), dim=-1>", "<tensors=($0, $1), dim=2>")),
    ],
)
def test_not_rotary(form: tuple[int, str]) -> None:
    step = fused(form)
    assert "nn.rotary" not in names(step.program.graph)
