"""Lowering: fusion, sharing of kernels, complete error messages, positions out of range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from tvm import tirx

from moec.codegen.backends.cpu.backend import CPU
from moec.codegen.fusion import partition
from moec.codegen.loops.index import Sizes
from moec.codegen.lower import lower
from moec.codegen.package import build, index_ranges
from moec.codegen.unsupported import check
from moec.errors import InputError, UnsupportedError
from moec.ir.graph import Graph, Module, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.sizes.dims import Bounds, symbol
from moec.ir.text import parse
from moec.runtime.call.executor import Executor
from moec.target.cpu import host


def run(graph: Graph, tensors: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> list:
    executor = Executor(build(Module.of(Program(graph, weights)), host()))
    return list(executor(tensors).values())


def roots(text: str) -> list[str]:
    return [group.root.name for group in partition(parse(text), lambda op: False)]


def test_a_chain_is_one_kernel() -> None:
    assert roots("""
    graph main(x: f32[T, 8]) {
      a: f32[T, 8] = aten.exp.default(x)
      b: f32[T, 8] = aten.add.Tensor(a, x)
      c: f32[T, 8] = aten.mul.Tensor(b, a)
      return c
    }""") == ["aten.mul.Tensor"]


def test_products_of_the_same_rows_are_one_kernel() -> None:
    """Also where an op between them reads the first; and never more than four."""
    lines = "".join(
        f"  y{i}: f32[T, {n}] = aten.linear.default(x, w{i})\n"
        for i, n in enumerate((3, 5, 3, 7, 2))
    )
    params = ", ".join(f"w{i}: f32[{n}, 8]" for i, n in enumerate((3, 5, 3, 7, 2)))
    graph = parse(
        f"graph main(x: f32[T, 8]; {params}) {{\n  size T in [0, inf]\n"
        + lines.replace("  y1:", "  z: f32[T, 3] = aten.silu.default(y0)\n  y1:")
        + "  return z, y0, y1, y2, y3, y4\n}\n"
    )
    lowered = lower(Module.of(Program(graph, {})), host(), CPU)
    names = [v.name_hint for v in lowered.module.get_global_vars()]
    assert sorted(n for n in names if n.startswith("linear")) == ["linear", "linears"]
    weights = {p.name: torch.randn(*map(int, p.shape)) for p in graph.params}
    x = torch.randn(6, 8)
    result = Executor(build(Module.of(Program(graph, weights)), host()))({"x": x})
    for i in range(5):
        torch.testing.assert_close(result[f"y{i}"], x @ weights[f"w{i}"].T)


def test_what_two_kernels_need_is_stored_once() -> None:
    assert roots("""
    graph main(x: f32[T, 8]) {
      a: f32[T, 8] = aten.exp.default(x)
      b: f32[T] = aten.sum.dim_IntList(a) <dim=(1)>
      c: f32[8] = aten.sum.dim_IntList(a) <dim=(0)>
      return b, c
    }""") == ["aten.exp.default", "aten.sum.dim_IntList", "aten.sum.dim_IntList"]


def test_an_expensive_value_is_not_computed_again_for_every_row() -> None:
    assert roots("""
    graph main(x: f32[8], y: f32[T, 8]) {
      a: f32[8] = aten.exp.default(x)
      b: f32[T, 8] = aten.mul.Tensor(y, a)
      return b
    }""") == ["aten.exp.default", "aten.mul.Tensor"]


def test_layers_share_kernels_whatever_their_sizes_are_called() -> None:
    graph = parse("""
        graph main(x: f32[S, 8], y: f32[T, 8]) {
          a: f32[S, 8] = aten.silu.default(x)
          b: f32[T, 8] = aten.silu.default(y)
          c: f32[T, 8] = aten.relu.default(y)
          return a, b, c
        }""")
    lowered = lower(Module.of(Program(graph, {})), host(), CPU)
    kernels = [g.name_hint for g in lowered.module.get_global_vars() if g.name_hint != "main"]
    assert sorted(kernels) == ["fused_relu", "fused_silu"]


def test_everything_unsupported_is_listed_at_once() -> None:
    graph = parse("""
    graph main(x: f32[T, 8]) {
      a: i64[u0, 2] = aten.nonzero.default(x) @ model.router
      b: f32[T, 8] = aten.bernoulli.default(x) @ model.dropout
      c: f32[T, 8] = aten.bernoulli.default(b) @ model.noise
      return c
    }""")
    with pytest.raises(UnsupportedError) as error:
        lower(Module.of(Program(graph, {})), host(), CPU)
    text = str(error.value)
    assert (
        "aten.nonzero.default has a result whose size depends on the data (1 time: at model" in text
    )
    assert "aten.bernoulli.default has no kernel (2 times: at model.dropout, model.noise)" in text
    assert "size u0" not in text  # said already
    assert "replace these operations" in text


def test_experts_that_cannot_be_lowered_name_the_operator_in_their_body() -> None:
    graph = parse("""
    graph main(x: f32[T, 4], rows: i64[T], ends: i64[2]; w: f32[2, 4, 4]) {
      y: f32[T, 4] = moe.experts(x, rows, ends, w) <form="loop"> {
        graph body(x: f32[R, 4]; p0: f32[4, 4]) {
          h: f32[R, 4] = aten.linear.default(x, p0)
          e: f32[R, 4] = aten.special_erfcx.default(h)
          return e
        }
      }
      return y
    }""")
    words = "moe.experts has no kernel: its body holds aten.special_erfcx.default, which has none"
    with pytest.raises(UnsupportedError, match=words):
        check(graph, lambda op: False)


def test_two_ops_of_one_name_have_reasons_of_their_own() -> None:
    graph = parse("""
    graph main(x: f32[T, 64], c: u8[8, 64], s: bf16[8, 1]; d: u8[8, 64], t: bf16[8, 1]) {
      a: f32[T, 8] = nn.quantised_linear(x, c, s) <kind="int8"> @ first
      b: f32[T, 8] = nn.quantised_linear(x, d, t) <kind="fp8"> @ second
      return a, b
    }""")
    with pytest.raises(UnsupportedError) as error:
        lower(Module.of(Program(graph, {})), host(), CPU)
    first, second = (line for line in str(error.value).splitlines() if "quantised" in line)
    assert "its weight or bias is computed" in first
    assert "fp8" not in first
    assert first.endswith("at first)")
    assert "do not round those of fp8 weights" in second
    assert second.endswith("at second)")


def test_rounded_rows_of_fp8_weights_are_refused_by_a_cpu_in_words() -> None:
    graph = parse("""
    graph main(x: f32[T, 64], ends: i32[3];
               c: u8[3, 4, 64], s: bf16[3, 4, 1], d: u8[8, 64], t: bf16[8, 1]) {
      a: f32[T, 4] = grouped.quantised(x, ends, c, s) <matrices=1, kind="fp8", dtype=f32> @ experts
      b: f32[T, 8] = nn.quantised_linear(x, d, t) <kind="fp8"> @ head
      return a, b
    }""")
    with pytest.raises(UnsupportedError) as error:
        lower(Module.of(Program(graph, {})), host(), CPU)
    why = "its rows are rounded to 8 bits, and CPU kernels do not round those of fp8 weights"
    for name, at in (("grouped.quantised", "experts"), ("nn.quantised_linear", "head")):
        (line,) = [line for line in str(error.value).splitlines() if name in line]
        assert why in line
        assert line.endswith(f"compile for CPUs alone, or choose int8 (1 time: at {at})")


@pytest.mark.parametrize(
    ("attributes", "width", "blocks", "why"),
    [
        ('kind="int8", row_bits=0', 64, 1, "as CPU kernels of int8 need"),
        ('kind="fp8", row_bits=0', 66, 11, "its blocks are of 6 weights"),
    ],
)
def test_rows_and_blocks_that_no_kernel_multiplies(attributes, width, blocks, why) -> None:
    graph = parse(f"""
    graph main(x: f32[T, {width}]; c: u8[8, {width}], s: bf16[8, {blocks}]) {{
      a: f32[T, 8] = nn.quantised_linear(x, c, s) <{attributes}>
      return a
    }}""")
    with pytest.raises(UnsupportedError, match=why):
        lower(Module.of(Program(graph, {})), host(), CPU)


def test_a_size_that_the_export_fixed_is_refused() -> None:
    graph = parse("""
    graph main(x: f32[T, 4]) {
      a: f32[ceiling(T/64), 4] = aten.slice.Tensor(x) <dim=0, step=64>
      b: f32[1, 4] = aten.exp.default(a) @ model.chunks
      return b
    }""")
    with pytest.raises(UnsupportedError, match=r"at model.chunks .* fixed a size that varies"):
        lower(Module.of(Program(graph, {})), host(), CPU)
    bounded = replace(graph, bounds={"T": Bounds(1, 64)})
    lower(Module.of(Program(bounded, {})), host(), CPU)


def test_positions_out_of_range_read_the_nearest_row() -> None:
    graph = parse("""
    graph main(x: f32[4, 2], i: i64[T]; w: f32[5, 3]) {
      a: f32[T, 3] = aten.embedding.default(w, i)
      b: f32[T, 2] = aten.index.Tensor(x, i) <indices=($1)>
      return a, b
    }""")
    w, x = torch.arange(15.0).view(5, 3), torch.arange(8.0).view(4, 2)
    ids = torch.tensor([2**62, -(2**62), 3, -1])
    package = build(Module.of(Program(graph, {"w": w})), host())
    assert package.main.index_ranges == {"i": (0, 3)}
    main = replace(package.main, index_ranges={})
    unchecked = replace(package, functions={"main": main})
    a, b = Executor(unchecked)({"x": x, "i": ids}).values()
    assert torch.equal(a, w[[4, 0, 3, 4]])
    assert torch.equal(b, x[[3, 0, 3, 3]])


EVERY_LOOKUP = """
graph main(x: f32[N, 3], i: i64[T], j: i64[T, 3], e: f32[0, 3]) {
  a: f32[T, 3] = aten.index.Tensor(x, i) <indices=($1)>
  b: f32[T, 3] = aten.index_select.default(x, i) <dim=0>
  c: f32[T, 3] = aten.gather.default(x, j) <dim=0>
  d: f32[T, 3] = aten.index.Tensor(e, i) <indices=($1)>
  f: f32[N, T] = aten.index.Tensor(x, i) <indices=(none, $1)>
  return a, b, c, d, f
}"""


def test_no_row_of_an_empty_table_is_read() -> None:
    package = build(Module.of(Program(parse(EVERY_LOOKUP), {})), host())
    unchecked = replace(package, functions={"main": replace(package.main, index_ranges={})})
    inputs = {
        "x": torch.empty(0, 3),
        "i": torch.tensor([1, 0]),
        "j": torch.ones(2, 3, dtype=torch.int64),
        "e": torch.empty(0, 3),
    }
    results = Executor(unchecked)(inputs)
    for name in "abcd":
        assert torch.equal(results[name], torch.zeros(2, 3))
    assert results["f"].shape == (0, 2)


def test_indices_of_a_table_whose_size_varies_are_checked() -> None:
    graph = parse(EVERY_LOOKUP.replace("e: f32[0, 3]", "e: f32[5, 3]"))
    assert index_ranges(graph) == {"i": (0, "Min(2, N - 1)"), "j": (0, "N - 1")}
    text = """
    graph main(x: f32[N, 3], i: i64[T]) {
      a: f32[T, 3] = aten.index.Tensor(x, i) <indices=($1)>
      return a
    }"""
    executor = Executor(build(Module.of(Program(parse(text), {})), host()))
    x = torch.arange(6.0).view(2, 3)
    (result,) = executor({"x": x, "i": torch.tensor([-2, 1])}).values()
    assert torch.equal(result, x)
    with pytest.raises(
        InputError, match=r"'i' holds 2 at \[1\], and its values must be from -2 to"
    ):
        executor({"x": x, "i": torch.tensor([0, 2])})
    with pytest.raises(InputError, match="'i' indexes a table that has no rows in this call"):
        executor({"x": x[:0], "i": torch.tensor([0])})
    assert executor({"x": x[:0], "i": torch.empty(0, dtype=torch.int64)})["a"].shape == (0, 3)


def test_writes_out_of_range_are_left_out() -> None:
    graph = parse("""
    graph main(x: f32[4, 2], i: i64[T, 2]) {
      a: f32[4, 2] = aten.scatter.value(x, i) <dim=0, value=9.0>
      return a
    }""")
    x, ids = torch.zeros(4, 2), torch.tensor([[2**40, 1], [-1, -(2**40)]])
    package = build(Module.of(Program(graph, {})), host())
    assert package.main.index_ranges == {"i": (0, 3)}
    with pytest.raises(InputError, match="its values must be from 0 to 3"):
        Executor(package)({"x": x, "i": ids})
    main = replace(package.main, index_ranges={})  # as in a forged manifest
    (result,) = Executor(replace(package, functions={"main": main}))({"x": x, "i": ids}).values()
    assert torch.equal(result, torch.tensor([[0.0, 0], [0, 9], [0, 0], [9, 0]]))


def test_ranges_are_found_through_reshapes() -> None:
    graph = parse("""
    graph main(i: i64[B, S]; w: f32[5, 3]) {
      a: i64[B*S] = aten.view.default(i) <size=({B*S})>
      b: f32[B*S, 3] = aten.embedding.default(w, a)
      return b
    }""")
    assert index_ranges(graph) == {"i": (0, 4)}


def test_greatest_come_in_order_with_the_lower_id_first() -> None:
    graph = parse("""
    graph main(x: f32[T, 8]) {
      v: f32[T, 3], i: i64[T, 3] = aten.topk.default(x) <k=3>
      w: f32[T, 3], j: i64[T, 3] = aten.topk.default(x) <k=3, largest=false>
      return v, i, w, j
    }""")
    nan = float("nan")
    x = torch.tensor([[1.0, 2, 2, 1, 2, 0, 0, 0], [nan, 3, nan, 4, 0, 0, 0, 0]])
    _, i, _, j = run(graph, {"x": x}, {})
    assert i.tolist() == [[1, 2, 4], [0, 2, 3]]
    assert j.tolist() == [[5, 6, 7], [4, 5, 6]]


@pytest.mark.parametrize("order", ["token", "slot"])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_capacity(order: str, tokens: int) -> None:
    graph = parse(f"""
    graph main(e: i64[T, 2]) {{
      kept: i64[T, 2] = moe.capacity(e) <num_experts=3, capacity=2, order="{order}">
      return kept
    }}""")
    torch.manual_seed(0)
    experts = torch.randint(0, 4, (tokens, 2))
    (result,) = run(graph, {"e": experts}, {})
    assert torch.equal(result, evaluate(graph, [experts])[0])


@pytest.mark.parametrize("counts", [[0, 0, 0], [3, 0, 2], [0, 5, 0]])
def test_grouped_products_without_a_fast_kernel(counts: list[int]) -> None:
    graph = parse("""
    graph main(x: f32[R, 4], ends: i32[3], scale: f32[3, 5, 4]; w: f32[3, 5, 4]) {
      s: f32[3, 5, 4] = aten.mul.Tensor(w, scale)
      h: f32[R, 5] = grouped.linear(x, ends, s) <matrices=1, dtype=f32> {
        graph body(a: f32[N, 5]) {
          c: f32[N, 5] = aten.atan2.default(a, a)
          return c
        }
      }
      return h
    }""")
    torch.manual_seed(0)
    ends = torch.tensor(counts).cumsum(0).int()
    x, w = torch.randn(int(sum(counts)) + 2, 4), torch.randn(3, 5, 4)
    scale = torch.randn(3, 5, 4)
    (result,) = run(graph, {"x": x, "ends": ends, "scale": scale}, {"w": w})
    (expected,) = evaluate(graph, [x, ends, scale], {"w": w})
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_state_is_kept_between_calls() -> None:
    graph = parse("""
    graph main(x: f32[T], total: f32[1]) {
      s: f32[1] = aten.sum.dim_IntList(x) <dim=(0), keepdim=true>
      next: f32[1] = aten.add.Tensor(total, s)
      twice: f32[1] = aten.mul.Scalar(next) <other=2>
      state total -> next
      return twice
    }""")
    run = Executor(build(Module.of(Program(graph, {"total": torch.tensor([1.0])})), host()))
    assert run({"x": torch.tensor([1.0, 2])})["twice"].tolist() == [8.0]
    assert run({"x": torch.tensor([])})["twice"].tolist() == [8.0]
    run.reset()
    assert run({"x": torch.tensor([5.0])})["twice"].tolist() == [12.0]


def test_a_weight_in_two_layouts_is_noted() -> None:
    graph = parse("""
    graph main(i: i64[T]; w: f32[8, 4]) {
      x: f32[T, 4] = aten.embedding.default(w, i)
      y: f32[T, 8] = aten.linear.default(x, w)
      return y
    }""")
    package = build(Module.of(Program(graph, {"w": torch.randn(8, 4)})), host())
    assert package.notes == ("weight w is stored 2 times: w, w.packed",)
    assert package.kernels == (("y", "linear"),)


def test_a_size_that_no_kernel_computes_is_named() -> None:
    size = sympy.log(symbol("T"))
    with pytest.raises(UnsupportedError, match=r"size log\(T\) cannot be computed: it uses log"):
        Sizes({"T": tirx.Var("T", "int64")}).expr(size)


def test_sizes_are_divided_by_negative_sizes_as_in_python() -> None:
    graph = parse("""
        graph main(x: i64[T]) {
          a: i64[T] = aten.add.Tensor(x) <other={floor(100/(T - 4))}>
          b: i64[T] = aten.add.Tensor(x) <other={ceiling(70/(T - 4))}>
          c: i64[T] = aten.add.Tensor(x) <other={Mod(30, T - 4)}>
          return a, b, c
        }""")
    for tokens in (1, 2, 3, 5, 6, 13):
        divisor = tokens - 4
        quotients = run(graph, {"x": torch.zeros(tokens, dtype=torch.int64)}, {})
        expected = 100 // divisor, -(-70 // divisor), 30 % divisor
        assert tuple(int(q[0]) for q in quotients) == expected
