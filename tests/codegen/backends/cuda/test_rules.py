"""Which CUDA kernel an op gets, and the reason if it gets none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.codegen.backends.cuda.backend import CUDA
from moec.codegen.lower import lower, unsupported
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from moec.target.cuda import TARGETS

_SORT = "order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>"


def _linear(dtype: str, width: int, params: str, more: str = "") -> str:
    return f"""graph main(x: {dtype}[T, {width}]; {params}) {{
      y: {dtype}[T, 4] = aten.linear.default(x, w{more})
      return y
    }}"""


def _grouped(inputs: str, operands: str = "order", attrs: str = "") -> str:
    return f"""graph main(x: bf16[T, 8], i: i64[T, 2]{inputs}) {{
      {_SORT}
      y: bf16[2*T, 4] = grouped.linear(x, ends, w, {operands}) <matrices=1, {attrs}gather=2>
      return y
    }}"""


REFUSED = {
    "float64": (_linear("f64", 8, "w: f64[4, 8]"), "linear: it computes in f64"),
    "float32 rows that are not a multiple of 16 bytes": (
        _linear("f32", 6, "w: f32[4, 6]"),
        "linear: its rows of 6 elements are not a multiple of 16 bytes",
    ),
    "a bias of another dtype": (
        _linear("bf16", 8, "w: bf16[4, 8], b: f32[4]", ", b"),
        "linear: its bias differs from the rows in dtype",
    ),
    "rows that are not a multiple of 16 bytes": (
        _linear("bf16", 6, "w: bf16[4, 6]"),
        "linear: its rows of 6 elements are not a multiple of 16 bytes",
    ),
    "a stack that is computed": (
        _grouped(", w: bf16[3, 4, 8]"),
        "grouped: a stack of its weights is computed, not a weight of the model",
    ),
    "stacks of two shapes": (
        _grouped("; w: f32[3, 4, 8]"),
        "grouped: its stacks differ in shape, or from the rows in dtype",
    ),
    "a bias of another dtype than the rows": (
        _grouped("; w: bf16[3, 4, 8], b: f32[3, 4]", "b, order", "biased=true, "),
        "grouped: its biases differ from the rows in dtype",
    ),
    "scaled rows": (
        _grouped(", s: f32[T, 2]; w: bf16[3, 4, 8]", "order, s", "scaled=true, "),
        "grouped: its rows are scaled before they are multiplied",
    ),
    "rows of no expert that are read": (
        _grouped("; w: bf16[3, 4, 8]"),
        "grouped: rows that belong to no expert are read, and the kernel does not compute them",
    ),
    "more choices than lanes": (
        """graph main(x: f32[T, 64]) {
          w: f32[T, 40], e: i64[T, 40] = moe.route(x) <k=40>
          return w, e
        }""",
        "route: 40 choices of a token are more than the lanes of a warp",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_why_an_op_has_no_kernel(name: str) -> None:
    text, reason = REFUSED[name]
    selection = CUDA.select(parse(text))
    (refusal,) = selection.refusals
    assert refusal.reason == reason
    assert {op.name for op in selection.rules} <= {"moe.sort"}


def test_an_odd_number_of_columns_has_a_kernel() -> None:
    """Heads of 49155 words, as Granite's."""
    selection = CUDA.select(
        parse("""graph main(x: bf16[T, 8]; w: bf16[3, 8]) {
          y: bf16[T, 3] = aten.linear.default(x, w)
          return y
        }""")
    )
    assert [rule.name for rule in selection.rules.values()] == ["linear"]


@pytest.mark.parametrize(("width", "kernels"), [(8, ["linear", "route"]), (6, ["route"])])
def test_the_logits_of_a_gate(width: int, kernels: list[str]) -> None:
    """A product where one takes them, else a loop; the weight is widened once, when packed."""
    graph = parse(f"""graph main(x: bf16[T, {width}]; w: bf16[4, {width}]) {{
      s: f32[T, 2], e: i64[T, 2] = moe.gate(x, w) <k=2, compute=f32, logits=f32>
      return s, e
    }}""")
    module = Module.of(Program(graph, {"w": torch.ones(4, width, dtype=torch.bfloat16)}))
    lowered = lower(module, TARGETS["cuda:sm_80"], CUDA)
    assert [kernel for _, kernel in lowered.kernels] == kernels
    (param,) = lowered.params["main"]
    assert (param.name, param.type.dtype) == ("w.f32", "f32")
    assert param.pack is not None
    assert param.pack(torch.ones(4, width, dtype=torch.bfloat16)).dtype == np.float32


@pytest.mark.parametrize(
    ("dtype", "width", "rule"),
    [
        ("bf16", 16, "tile_attention"),
        ("f32", 16, "attention"),
        ("bf16", 24, "attention"),
        ("f16", 512, "attention"),
    ],
)
def test_attention_uses_tensor_cores_where_a_tile_supports_it(
    dtype: str, width: int, rule: str
) -> None:
    """The window stays one of the kernel; it does not become a mask."""
    shape = f"{dtype}[B, 2, S, {width}]"
    graph = parse(f"""graph main(q: {shape}, k: {shape}, v: {shape}) {{
      y: {shape} = nn.attention(q, k, v) <scale=0.25, causal=true, window=4>
      return y
    }}""")
    (selected,) = CUDA.select(graph).rules.values()
    assert selected.name == rule
    lowered = lower(Module.of(Program(graph, {})), TARGETS["cuda:sm_80"], CUDA)
    assert [kernel for _, kernel in lowered.kernels] == [rule]


def test_what_has_a_kernel() -> None:
    selection = CUDA.select(
        parse(f"""graph main(x: bf16[T, 8], i: i64[T, 2], s: f32[T, 2]; w: bf16[3, 4, 8]) {{
          {_SORT}
          y: bf16[2*T, 4] = grouped.linear(x, ends, w, order) <matrices=1, gather=2>
          out: bf16[T, 4] = moe.combine(y, slots, s) <k=2, tokens={{T}}, weighted=true>
          return out
        }}""")
    )
    assert selection.refusals == ()
    assert [rule.name for rule in selection.rules.values()] == ["sort", "grouped", "combine"]


def test_compressed_experts_are_refused_by_name() -> None:
    graph = parse("""graph main(x: f32[T, 72], ends: i32[3];
                     codes: u8[3, 40, 18], low: bf16[3, 40], high: bf16[3, 40]) {
      h: f32[T, 40] = grouped.compressed(x, ends, codes, low, high)
        <matrices=1, kind="ternary", dtype=f32>
      return h
    }""")
    assert "grouped.compressed" in unsupported(graph, CUDA)
