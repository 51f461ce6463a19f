"""Linear layers with weights of few bits, from the op to the kernel, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.cpu.quantised.grouped import quantised_linears
from moec.codegen.package import build as package
from moec.codegen.specs.products import QuantisedSpec
from moec.ir.formats.integer import quantise
from moec.ir.formats.notation import parse
from moec.ir.graph import Module, Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse as read
from moec.runtime.call.executor import Executor
from moec.target.cpu import TARGETS, missing

RUNNABLE = [
    t for t in TARGETS.values() if not missing(t) and t.name != "amx"
]  # gemm/test_amx_tile.py
# As in test_quantised: integers are exact, some dozen float32 roundings are left, and a row of 16
# bits may round to the code beside; bf16, of 8 bits, may then round to the number beside.
CLOSE = {"f32": 4e-6 + 1 / 32639, "bf16": 2**-7}


def graph_of(dtype: str, *matrices: tuple[str, int, bool], k: int, x: str = "T, {k}") -> str:
    """Linear layers (format, N, biased) of one x."""
    inputs = f"x: {dtype}[{x.format(k=k)}]"
    params, ops, outputs = [], [], []
    lead = x.format(k=k).rpartition(",")[0]
    for i, (text, n, biased) in enumerate(matrices):
        format = parse(text)
        scales = f"{format.scale_dtype}[{n}, {format.blocks(k)}]"
        params += [f"w{i}: u8[{n}, {k}]", f"s{i}: {scales}"]
        reads, attrs = [f"w{i}", f"s{i}"], [f'kind="{format.kind}"']
        if format.row_bits == 16:
            attrs.append("row_bits=16")
        if format.asymmetric:
            params.append(f"z{i}: u8[{n}, {format.blocks(k)}]")
            reads.append(f"z{i}")
            attrs.append("zeros=true")
        if biased:
            params.append(f"b{i}: {dtype}[{n}]")
            reads.append(f"b{i}")
            attrs.append("biased=true")
        ops.append(
            f"y{i}: {dtype}[{lead}, {n}] = nn.quantised_linear(x, {', '.join(reads)}) "
            f"<{', '.join(attrs)}>"
        )
        outputs.append(f"y{i}")
    sizes = "\n".join(f"size {s} in [0, inf]" for s in ("T", "B") if s in inputs)
    return (
        f"graph main({inputs}; {', '.join(params)}) {{\n{sizes}\n"
        + "\n".join(ops)
        + f"\nreturn {', '.join(outputs)}\n}}"
    )


def program(dtype: str, *matrices: tuple[str, int, bool], k: int, x: str = "T, {k}") -> Program:
    graph = read(graph_of(dtype, *matrices, k=k, x=x))
    verify(graph, Stage.GROUPED)
    weights: dict[str, torch.Tensor] = {}
    for i, (text, n, biased) in enumerate(matrices):
        codes = quantise(parse(text), torch.randn(1, n, k) * 0.1)
        weights |= {f"w{i}": codes.codes[0], f"s{i}": codes.scales[0]}
        if codes.zeros is not None:
            weights[f"z{i}"] = codes.zeros[0]
        if biased:
            weights[f"b{i}"] = torch.randn(n).to(getattr(torch, LONG[dtype]))
    return Program(graph, weights)


LONG = {"f32": "float32", "bf16": "bfloat16"}
THREE = (("int8", 70, True), ("int8:asymmetric", 33, False), ("int4", 48, True))
WIDER = ("int4:asymmetric:rows16", 40, True)  # of the same rows, and in a kernel of its own


def compare(executor: Executor, of: Program, x: torch.Tensor, close: float) -> None:
    result = executor({"x": x})
    for value, expected in zip(of.graph.outputs, evaluate(of.graph, [x], of.weights), strict=True):
        actual, expected = result[value.name].double(), expected.double()
        finite = expected.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        if finite.any():
            assert (actual - expected)[finite].abs().max() <= close * (
                1 + expected[finite].abs().max()
            )


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_several_of_the_same_rows(target, dtype):
    """As one kernel: formats beside each other, biases, widths that fill no vector, and rows of
    zeros, of NaN and of an infinity."""
    of = program(dtype, *THREE, WIDER, k=96)
    built = package(Module.of(of), target)
    assert [kernel for _, kernel in built.kernels].count("int8 linear") == 2
    assert [kernel for _, kernel in built.kernels].count("int4 linear") == 2
    executor = Executor(built)
    for t in (0, 1, 5, 100):
        x = torch.randn(t, 96)
        if t > 3:
            x[0], x[1], x[2, 5] = 0, float("nan"), float("inf")
        compare(executor, of, x.to(getattr(torch, LONG[dtype])), CLOSE[dtype])


@pytest.fixture(scope="module")
def blocks() -> tuple[Executor, Program]:
    of = program("f32", ("int4:32", 40, False), ("int8", 20, False), k=64, x="B, T, {k}")
    return Executor(package(Module.of(of), RUNNABLE[-1])), of


@settings(max_examples=30)
@given(batch=st.integers(0, 3), tokens=st.integers(0, 9))
def test_any_number_of_rows(blocks, batch, tokens):
    """Of rows that are rounded in blocks, and as a whole, once each."""
    executor, of = blocks
    compare(executor, of, torch.randn(batch, tokens, 64), CLOSE["f32"])


def test_rows_do_not_depend_on_the_rows_beside_them(blocks):
    executor, _ = blocks
    x = torch.randn(1, 100, 64)
    full = executor({"x": x})
    for row in (0, 41, 99):
        one = executor({"x": x[:, row : row + 1]})
        assert all(torch.equal(one[n][0, 0], full[n][0, row]) for n in one)


def test_products_that_cannot_share_a_kernel():
    narrow, wide = (QuantisedSpec(8, k, "float32") for k in (32, 64))
    blocked = QuantisedSpec(8, 64, "float32", format=parse("int8:32"))
    finer = QuantisedSpec(8, 64, "float32", format=parse("int8:rows16"))
    for specs in ((narrow, wide), (wide, blocked), (wide, finer)):
        with pytest.raises(ValueError, match="rows of other widths or blocks"):
            quantised_linears(RUNNABLE[-1], specs)
    with pytest.raises(ValueError, match="must be dense"):
        quantised_linears(RUNNABLE[-1], (QuantisedSpec(8, 32, "float32", groups=2),))
