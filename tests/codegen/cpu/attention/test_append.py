"""Keys and values of new tokens are written to a cache in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import tvm
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.build import compile_kernels
from moec.codegen.cpu.attention.append import append
from moec.codegen.specs.attention import AnglesSpec, AppendSpec
from moec.ir.graph import Op, TensorType, Value
from moec.ir.ops import OPS
from moec.ir.sizes.dims import symbol
from moec.target.cpu import TARGETS, CpuTarget, host

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SPECS = (
    AppendSpec("f32", 2, 24),
    AppendSpec("bf16", 3, 64),
    AppendSpec("f16", 1, 33),
    AppendSpec("bf16", 2, 32, tokens_first=True),
)


def angles(dtype: str, full: tuple[bool, bool, bool], width: int) -> tuple[AnglesSpec, AnglesSpec]:
    return AnglesSpec(dtype, full, width), AnglesSpec(dtype, full, width)


PLACES = (True, False, True)
TURNED = (
    AppendSpec("bf16", 2, 32, tokens_first=True, turns=angles("bf16", PLACES, 32)),
    AppendSpec("bf16", 2, 40, turns=angles("f32", PLACES, 20)),
    AppendSpec("f32", 3, 6, tokens_first=True, turns=angles("f32", (False, False, True), 6)),
    AppendSpec("f16", 1, 64, turns=angles("f16", (True, True, True), 32)),
)


def op_of(spec: AppendSpec) -> Op:
    b, length, s = map(symbol, ("B", "L", "S"))
    values = [
        Value("cache", TensorType(spec.dtype, (b, spec.heads, length, spec.width))),
        Value("rows", TensorType(spec.dtype, (*spec.row(b, spec.heads, s), spec.width))),  # type: ignore[arg-type]
        Value("first", TensorType("i64", (b,))),
    ]
    for name, of in zip(("cos", "sin"), spec.turns or (), strict=False):
        sizes = (
            size if full else 1 for size, full in zip((b, spec.heads, s), of.full, strict=True)
        )
        values.append(Value(name, TensorType(of.dtype, (*sizes, of.width))))
    attrs = {"tokens_first": spec.tokens_first, "turned": spec.turns is not None}
    return Op("nn.append", tuple(values), (), attrs)


def expected(spec: AppendSpec, *tensors: torch.Tensor) -> torch.Tensor:
    """What the op means."""
    op = op_of(spec)
    assert OPS["nn.append"].infer(op) == (op.inputs[0].type,)
    result: torch.Tensor = OPS["nn.append"].reference(op, tensors, op.attrs, None)  # type: ignore[arg-type]
    return result


def random_rows(spec: AppendSpec, texts: int, tokens: int) -> torch.Tensor:
    shape = (texts, tokens, spec.heads) if spec.tokens_first else (texts, spec.heads, tokens)
    return torch.randn(*shape, spec.width).to(TORCH[spec.dtype])


@pytest.fixture(scope="module")
def kernels(
    build: Callable[[CpuTarget, tvm.tirx.PrimFunc], Callable[..., None]],
) -> dict[AppendSpec, Callable[..., None]]:
    return {spec: build(host(), append(spec, host())) for spec in (*SPECS, *TURNED)}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@given(texts=st.integers(1, 3), tokens=st.integers(1, 9), spare=st.integers(0, 5))
def test_writes_the_rows_and_nothing_else(
    kernels: dict[AppendSpec, Callable[..., None]],
    spec: AppendSpec,
    texts: int,
    tokens: int,
    spare: int,
) -> None:
    cache = torch.randn(texts, spec.heads, tokens + spare, spec.width).to(TORCH[spec.dtype])
    rows = random_rows(spec, texts, tokens)
    first = torch.randint(spare + 1, (texts,))
    want = expected(spec, cache, rows, first)
    kernels[spec](cache, rows, first)
    assert torch.equal(cache, want)


@pytest.mark.parametrize("spec", TURNED, ids=str)
@given(texts=st.integers(1, 3), tokens=st.integers(1, 9), spare=st.integers(0, 5))
def test_turns_the_rows_and_writes_nothing_else(
    kernels: dict[AppendSpec, Callable[..., None]],
    rounding: dict[torch.dtype, float],
    spec: AppendSpec,
    texts: int,
    tokens: int,
    spare: int,
) -> None:
    """Tolerance: two products and their sum, of which a fused one is not rounded, and the result
    rounded to its type."""
    assert spec.turns is not None
    dtype = TORCH[spec.dtype]
    cache = torch.randn(texts, spec.heads, tokens + spare, spec.width).to(dtype)
    rows, first = random_rows(spec, texts, tokens), torch.randint(spare + 1, (texts,))
    sizes = (texts, spec.heads, tokens)
    cos, sin = (
        torch.randn(*(n if f else 1 for n, f in zip(sizes, of.full, strict=True)), of.width).to(
            TORCH[of.dtype]
        )
        for of in spec.turns
    )
    want = expected(spec, cache, rows, first, cos, sin)
    before = cache.clone()
    kernels[spec](cache, rows, first, cos, sin)
    for text, start in enumerate(first.tolist()):
        new = slice(start, start + tokens)
        error = (cache - want)[text, :, new].abs().float()
        products = rows.abs().float().amax() * (cos.abs().amax() + sin.abs().amax()).float()
        bound = rounding[dtype] * want[text, :, new].abs().float() * 2 + products * 2.0**-22
        assert (error <= bound).all()
        old = torch.ones(cache.shape[2], dtype=torch.bool)
        old[new] = False
        assert torch.equal(cache[text, :, old], before[text, :, old])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", [SPECS[1], TURNED[1]], ids=str)
def test_compiles_for_every_target(spec: AppendSpec, target: str) -> None:
    compile_kernels(append(spec, TARGETS[target]), target=TARGETS[target])
