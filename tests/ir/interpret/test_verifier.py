"""One broken graph for each rule."""

import pytest

from moec.errors import IRError
from moec.ir.graph import Graph, Op, Stage, State, TensorType, Value
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse


def graph(ops: str, stage_ops: str = "return y", inputs: str = "x: f32[T, 4]") -> Graph:
    return parse(f"graph main({inputs}) {{\n{ops}\n{stage_ops}\n}}")


GOOD = "y: f32[T, 4] = aten.silu.default(x) @ mlp"


def test_a_good_graph_passes():
    verify(graph(GOOD), Stage.ATEN)


def test_defined_before_use():
    good = graph(GOOD)
    bad = Graph(good.inputs, (), (), good.outputs)
    with pytest.raises(IRError, match="returns y, which nothing defines"):
        verify(bad, Stage.ATEN)


def test_read_before_definition():
    x, y = (Value(n, TensorType("f32", (4,))) for n in "xy")
    with pytest.raises(IRError, match=r"y = aten.silu.default: reads x before it is defined"):
        verify(Graph((), (), (Op("aten.silu.default", (x,), (y,)),), (y,)), Stage.ATEN)


def test_names_are_unique():
    good = graph(GOOD)
    twin = Value("x", good.inputs[0].type)
    op = Op("aten.silu.default", good.inputs, (twin,))
    with pytest.raises(IRError, match="the name x is taken"):
        verify(Graph(good.inputs, (), (op,), (twin,)), Stage.ATEN)


def test_ops_belong_to_the_stage():
    text = "w: f32[T, 2], y: i64[T, 2] = moe.route(x) <k=2> @ gate"
    verify(graph(text), Stage.MOE)
    with pytest.raises(IRError, match=r"moe.route @ gate: does not belong in stage ATEN"):
        verify(graph(text), Stage.ATEN)


def test_types_follow_from_inputs():
    text = "w: f32[T, 3], y: i64[T, 2] = moe.route(x) <k=2>"
    with pytest.raises(IRError, match=r"is f32\[T, 3\].* but its inputs make it f32\[T, 2\]"):
        verify(graph(text), Stage.MOE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("w: f32[T, 5], y: i64[T, 5] = moe.route(x) <k=5>", "k=5 of 4 experts"),
        ('w: f32[T, 2], y: i64[T, 2] = moe.route(x) <k=2, score="tanh">', "unknown score"),
        ("w: f32[T, 1], y: i64[T, 1] = moe.route(x) <k=1, groups=3>", "3 groups of 4 experts"),
        ("y: f32[T, 4] = moe.nonsense(x)", "no such op"),
        ("y: f32[T, 4] = aten.cat.default(x) <tensors=($0, $1)>", "refers to input 1 of 1"),
    ],
)
def test_rules_of_ops(text, says):
    with pytest.raises(IRError, match=says):
        verify(graph(text), Stage.MOE)


def test_a_state_keeps_its_type():
    good = graph(GOOD)
    after = Value("z", TensorType("f32", (4,)))
    op = Op("aten.sum.dim_IntList", good.inputs, (after,), {"dim": (0,)})
    bad = Graph(good.inputs, (), (*good.ops, op), good.outputs, (State(good.inputs[0], after),))
    with pytest.raises(IRError, match=r"state x: f32\[T, 4\] becomes z: f32\[4\]"):
        verify(bad, Stage.ATEN)


def test_a_state_is_an_input():
    good = graph(GOOD)
    bad = Graph(good.inputs, (), good.ops, good.outputs, (State(good.outputs[0], good.outputs[0]),))
    with pytest.raises(IRError, match="state y is not an input"):
        verify(bad, Stage.ATEN)
