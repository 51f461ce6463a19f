"""Experts without a network: every kind, dtypes, tails, tokens that chose none of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import grouped_linear
from moec.codegen.cpu.routing.zero_experts import zero_experts
from moec.codegen.specs.products import LinearSpec
from moec.codegen.specs.routing import ZeroSpec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse
from moec.target.cpu import TARGETS, missing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
RUNNABLE = [t for t in TARGETS.values() if not missing(t) and t.name != "avx2-vnni"]
each_target = pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
KINDS = ("constant", "zero", "copy", "constant")
FIRST = 3


def reference(kinds, k, dtype, mixed, tensors):
    """What the op means in eager PyTorch, which a test of ir/ops checks."""
    x, ids, weights, *rest = tensors
    d, count = x.shape[1], kinds.count("constant")
    kind, named = NAMES[dtype], ", ".join(f'"{k}"' for k in kinds)
    params = [f"mix: {kind}[{count}, 2, {d}]"] if mixed else []
    params += [f"constants: {kind}[{count}, {d}]"] if count else []
    reads = ", ".join(["x", "ids", "w", *(p.split(":")[0] for p in params), "addend"])
    graph = parse(f"""
    graph main(x: {kind}[T, {d}], ids: i64[T, {k}], w: {kind}[T, {k}], addend: {kind}[T, {d}];
      {", ".join(params)}) {{
      size T in [0, inf]
      z: f32[T, {d}] = moe.zero_experts({reads}) <first={FIRST}, kinds=({named},), weighted=true,
        {"mixed=true, " if mixed else ""}added=true, dtype=f32>
      return z
    }}""")
    *weights_, addend = rest
    names = [p.split(":")[0] for p in params]
    inputs = dict(zip(names, weights_, strict=True))
    return evaluate(graph, [x, ids, weights, addend], inputs)[0]


def problem(t, k, width, dtype, mixed, kinds=KINDS):
    torch_dtype, count = DTYPES[dtype], kinds.count("constant")
    x, addend = (torch.randn(t, width).to(torch_dtype) for _ in range(2))
    ids = torch.rand(t, FIRST + len(kinds) + 2).topk(k).indices
    tensors = [x, ids, torch.rand(t, k).to(torch_dtype)]
    tensors += [(torch.randn(count, 2, width) / width**0.5).to(torch_dtype)] if mixed else []
    tensors += [torch.randn(count, width).to(torch_dtype)] if count else []
    return [*tensors, addend]


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "mixed"), [(1, True), (37, True), (256, False)])
def test_equals_its_meaning(build, rounding, target, dtype, width, mixed):
    k = 3
    spec = ZeroSpec(
        FIRST, KINDS, k, width, dtype, dtype, dtype, dtype if mixed else None, dtype, dtype
    )
    kernel = build(target, zero_experts(target, spec))
    for t in (0, 1, 40):
        tensors = problem(t, k, width, dtype, mixed)
        out = torch.empty(t, width, dtype=DTYPES[dtype])
        kernel(*tensors, out)
        expected = reference(KINDS, k, dtype, mixed, tensors).double()
        # Dots over `width` products in another order; then one rounding.
        allowed = rounding[DTYPES[dtype]] * expected.abs() + 2.0**-24 * (16 + width)
        assert ((out.double() - expected).abs() <= allowed).all()


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), max_size=6))
def test_any_choice(best, ids):
    """Twice the same expert, ids below and beyond, no token at all."""
    kernel, tensors = best
    t = len(ids)
    x, _, weights, mix, constants, addend = tensors
    chosen = torch.tensor(ids, dtype=torch.int64).reshape(t, 2)
    args = [x[:t], chosen, weights[:t], mix, constants, addend[:t]]
    out = torch.empty(t, x.shape[1])
    kernel(*args, out)
    expected = reference(KINDS, 2, "float32", True, args)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def best(build):
    target = RUNNABLE[-1]
    spec = ZeroSpec(FIRST, KINDS, 2, 21, *["float32"] * 6)
    return build(target, zero_experts(target, spec)), problem(6, 2, 21, "float32", True)


def test_what_nobody_chose_is_not_read(build):
    """Infinities and NaN in x and in the constants stay where they are."""
    target = RUNNABLE[-1]
    spec = ZeroSpec(
        1, ("copy", "constant"), 1, 20, "float32", "float32", "float32", None, "float32"
    )
    x = torch.full((3, 20), torch.nan)
    ids = torch.tensor([[0], [2], [3]])
    constants = torch.ones(1, 20)
    out = torch.empty(3, 20)
    build(target, zero_experts(target, spec))(x, ids, torch.ones(3, 1), constants, out)
    assert torch.equal(out, torch.tensor([0.0, 1.0, 0.0])[:, None].expand(3, 20))


def test_rows_of_nobody_are_left_alone_where_nobody_reads_them(build):
    target, spec = RUNNABLE[-1], LinearSpec(32, 16, "float32", "float32", groups=2)
    layout = Layout(spec, target)
    kernel = build(target, grouped_linear(target, spec, zero_unowned_rows=False))
    y = torch.full((5, 32), 7.0)
    kernel(torch.randn(5, 16), torch.tensor([1, 3]).int(), torch.randn(layout.shape), y)
    assert (y[3:] == 7).all()
    assert (y[:3] != 7).all()
