"""Graphs as text: printed text can be read back, and errors name the line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import IRError
from moec.ir.graph import DType, Graph, Op, Ref, TensorType, Value
from moec.ir.sizes.dims import symbol
from moec.ir.text import parse, print_graph

LAYER = """\
graph main(x: f32[T, 16], cache: f32[4]; router: f32[4, 16], w1: f32[4, 8, 16], w2: f32[4, 16, 8]) {
  size T in [0, 512]
  logits: f32[T, 4] = aten.linear.default(x, router) @ mlp.gate
  w: f32[T, 2], i: i64[T, 2] = moe.route(logits) <k=2, renormalize=true> @ "layers[0] gate"
  rows: f32[2*T, 16], order: i32[2*T], ends: i32[4] = moe.dispatch(x, i) <num_experts=4> @ mlp
  out: f32[2*T, 16] = moe.experts(rows, ends, w1, w2) @ mlp.experts {
    graph body(bx: f32[R, 16]; bw1: f32[8, 16], bw2: f32[16, 8]) {
      h: f32[R, 8] = aten.linear.default(bx, bw1)
      a: f32[R, 8] = aten.silu.default(h)
      y: f32[R, 16] = aten.linear.default(a, bw2)
      return y
    }
  }
  z: f32[T, 16] = moe.combine(out, order, w) <k=2, tokens={T}, dtype=f32, weighted=true> @ mlp
  c: f32[T, 32] = aten.cat.default(z, z) <tensors=($0, $1), dim=-1>
  cache_2: f32[4] = aten.mul.Tensor(cache) <other=0.5>
  state cache -> cache_2
  return c
}
"""


def test_a_layer_reads_back():
    assert print_graph(parse(LAYER)) == LAYER


attrs = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from([DType("bf16"), Ref(0), symbol("T") * 2, symbol("T") + 1]),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), attrs, max_size=4), st.text())
def test_any_attribute_reads_back(attributes, origin):
    x = Value("x", TensorType("f32", (symbol("T"),)))
    y = Value("y", x.type)
    graph = Graph((x,), (), (Op("aten.neg.default", (x,), (y,), attributes, None, origin),), (y,))
    text = print_graph(graph)
    again = parse(text)
    assert print_graph(again) == text
    assert dict(again.ops[0].attrs) == attributes
    assert again.ops[0].origin == origin


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("(x, router)", "(x, routre)", r"line 3: expected .*found 'routre'"),
        ("f32[T, 4]", "q32[T, 4]", "line 3: expected a type"),
        ("logits: f32[T, 4] =", "logits: f32[T, 4]", "line 3: expected '='"),
        ("return c\n}", "return c", "expected '}', found 'the end'"),
        ("<k=2, renormalize=true>", "<k=two>", "line 4: expected the value of an attribute"),
        ("in [0, 512]", "in [0, 512", "line 3"),
    ],
)
def test_a_fault_names_its_line(before, after, says):
    with pytest.raises(IRError, match=says):
        parse(LAYER.replace(before, after))


@given(st.text(), st.text(), st.text())
def test_any_name_reads_back(first, second, third):
    """Parameters of nn.Sequential begin with a digit: 0.weight."""
    x = Value("x" + first, TensorType("f32", (symbol("T"),)))
    w = Value(f"0.{second}", x.type)
    y = Value(f"return {third}", x.type)
    graph = Graph((x,), (w,), (Op("aten.add.Tensor", (x, w), (y,)),), (y, x))
    again = parse(print_graph(graph))
    assert print_graph(again) == print_graph(graph)
    assert [v.name for v in (*again.inputs, *again.params, *again.outputs)] == [
        v.name for v in (x, w, y, x)
    ]


def test_names_of_one_word_stand_without_quotes():
    x = Value("0.weight", TensorType("f32", (4,)))
    text = print_graph(Graph((x,), (), (), (x,)))
    assert text == 'graph main("0.weight": f32[4]) {\n  return "0.weight"\n}\n'
