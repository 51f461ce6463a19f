"""Keys and values of new tokens, written into a cache in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import tvm
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.cpu.append import AppendSpec, append
from moec.ir import Op, TensorType, Value
from moec.ops import OPS
from moec.sizes import symbol
from moec.target import TARGETS, Target, host

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SPECS = (
    AppendSpec("f32", 2, 24),
    AppendSpec("bf16", 3, 64),
    AppendSpec("f16", 1, 33),
    AppendSpec("bf16", 2, 32, tokens_first=True),
)


def expected(
    cache: torch.Tensor, rows: torch.Tensor, first: torch.Tensor, spec: AppendSpec
) -> torch.Tensor:
    """What the op means."""
    b, length, s = map(symbol, ("B", "L", "S"))
    values = [
        Value("cache", TensorType(spec.dtype, (b, spec.heads, length, spec.width))),
        Value("rows", TensorType(spec.dtype, (*spec.row(b, spec.heads, s), spec.width))),  # type: ignore[arg-type]
        Value("first", TensorType("i64", (b,))),
    ]
    attrs = {"tokens_first": spec.tokens_first}
    op = Op("nn.append", tuple(values), (), attrs)
    assert OPS["nn.append"].infer(op) == (values[0].type,)
    result: torch.Tensor = OPS["nn.append"].reference(op, [cache, rows, first], attrs, None)  # type: ignore[arg-type]
    return result


@pytest.fixture(scope="module")
def kernels(
    build: Callable[[Target, tvm.tirx.PrimFunc], Callable[..., None]],
) -> dict[AppendSpec, Callable[..., None]]:
    return {spec: build(host(), append(spec, host())) for spec in SPECS}


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
    shape = (texts, tokens, spec.heads) if spec.tokens_first else (texts, spec.heads, tokens)
    rows = torch.randn(*shape, spec.width).to(TORCH[spec.dtype])
    first = torch.randint(spare + 1, (texts,))
    want = expected(cache, rows, first, spec)
    kernels[spec](cache, rows, first)
    assert torch.equal(cache, want)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_every_target(target: str) -> None:
    module = tvm.IRModule({"append": append(SPECS[1], TARGETS[target])})
    tvm.compile(module, target=tvm.target.Target(TARGETS[target].tvm()))
