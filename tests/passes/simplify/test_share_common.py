"""Equal values are computed once."""

import pytest

from moec.ir.graph import Program, Stage
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import run
from moec.passes.simplify.share_common import ShareCommon


def shared(ops: str) -> str:
    graph = parse(f"graph main(x: f32[T, 4], i: i64[T, 2]) {{\n{ops}\n}}")
    return print_graph(
        run(Program(graph, {}), [ShareCommon()], stage=Stage.GROUPED)[-1].program.graph
    )


def test_chains_are_shared(golden):
    golden(
        shared(
            """a: f32[T, 4] = aten.silu.default(x)
            b: f32[T, 4] = aten.silu.default(x)
            c: f32[T, 4] = aten.neg.default(a)
            d: f32[T, 4] = aten.neg.default(b)
            e: f32[T, 4] = aten.add.Tensor(c, d)
            return e"""
        )
    )


def test_attributes_tell_ops_apart():
    text = shared(
        """a: f32[T, 4] = aten.add.Tensor(x) <other=1.0>
        b: f32[T, 4] = aten.add.Tensor(x) <other=2.0>
        return a, b"""
    )
    assert text.count("aten.add") == 2


def test_one_and_one_point_zero_and_true_differ():
    text = shared(
        """a: f32[T, 4] = aten.add.Tensor(x) <other=1>
        b: f32[T, 4] = aten.add.Tensor(x) <other=1.0>
        c: f32[T, 4] = aten.add.Tensor(x) <other=true>
        return a, b, c"""
    )
    assert text.count("aten.add") == 3


def test_a_dispatch_is_shared():
    text = shared(
        """r: f32[2*T, 4], o: i32[2*T], e: i32[3] = moe.dispatch(x, i) <num_experts=3>
        r2: f32[2*T, 4], o2: i32[2*T], e2: i32[3] = moe.dispatch(x, i) <num_experts=3>
        y: f32[2*T, 4] = aten.add.Tensor(r, r2)
        return y, o2, e2"""
    )
    assert text.count("moe.dispatch") == 1


def test_names_of_outputs_stay():
    text = shared(
        """a: f32[T, 4] = aten.alias.default(x)
        b: f32[T, 4] = aten.alias.default(x)
        return a, b"""
    )
    assert "return a, b" in text


@pytest.mark.parametrize("name", ["rand_like", "exponential", "uniform", "empty_like"])
def test_random_numbers_are_not_shared(name):
    text = shared(
        f"""a: f32[T, 4] = aten.{name}.default(x)
        b: f32[T, 4] = aten.{name}.default(x)
        return a, b"""
    )
    assert text.count(name) == 2
