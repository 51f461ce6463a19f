"""An ONNX file fails at sizes for which its graph was not captured, and names the rule."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from moec.errors import UnsupportedError, VerificationError
from tests.codegen.onnx.running import Run, agree, program, running, written

BOUNDED = """
graph bounded(x: f32[B, S, 4], y: f32[B, 2*S, 4]) {
  size B in [0, inf]
  size S in [2, 5]
  size {B*S} in [0, 12]
  z: f32[B, S, 4] = aten.relu.default(x)
  v: f32[B, 2*S, 4] = aten.relu.default(y)
  return z, v
}
"""
FREE = "graph free(x: f32[T, 4]) {\n  size T in [0, inf]\n" + (
    "  z: f32[T, 4] = aten.relu.default(x)\n  return z\n}\n"
)
UNKNOWN = "graph unknown(x: f32[2*T, 4]) {\n  size T in [0, 9]\n" + (
    "  z: f32[2*T, 4] = aten.relu.default(x)\n  return z\n}\n"
)


def inputs(batch: int, length: int, doubled: int, other: int | None = None) -> tuple[Tensor, ...]:
    rows = batch if other is None else other
    return torch.randn(batch, length, 4), torch.randn(rows, doubled, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return running(program(BOUNDED), tmp_path_factory.mktemp("bounded"))


@pytest.mark.parametrize(("batch", "length"), [(0, 2), (1, 2), (1, 5), (2, 5), (6, 2)])
def test_within_bounds_equals_eager(run: Run, batch: int, length: int) -> None:
    agree(program(BOUNDED), run, inputs(batch, length, 2 * length))


REFUSED = {
    "short": ((1, 1, 2), "S >= 2"),
    "long": ((1, 6, 12), "S <= 5"),
    "product": ((3, 5, 10), "B*S <= 12"),
    "other length": ((1, 3, 7), "axis 1 of y == 2*S"),
    "other batch": ((2, 3, 6, 1), "axis 0 of y == B"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_beyond_bounds_is_refused_by_name(run: Run, name: str) -> None:
    sizes, rule = REFUSED[name]
    x, y = inputs(*sizes)
    with pytest.raises(VerificationError, match=re.escape(rule)):
        run({"x": x, "y": y})


def test_every_output_is_guarded(tmp_path: Path) -> None:
    guarded = running(program(BOUNDED.replace("return z, v", "return v")), tmp_path)
    x, y = inputs(1, 6, 12)
    with pytest.raises(VerificationError, match="S <= 5"):
        guarded({"x": x, "y": y})


def test_inputs_of_one_shape_are_compared(tmp_path: Path) -> None:
    text = "graph alike(x: f32[T, 4], y: f32[T, 4], z: f32[T, 4]) {\n  size T in [0, inf]\n" + (
        "  v: f32[T, 4] = aten.add.Tensor(x, y)\n  return v\n}\n"
    )
    alike = running(program(text), tmp_path)
    rows = {name: torch.randn(5, 4) for name in "xyz"}
    assert torch.equal(alike(rows)["v"], rows["x"] + rows["y"])
    for name in "xyz":
        with pytest.raises(VerificationError, match="x to z have one shape"):
            alike(rows | {name: torch.randn(1, 4)})


def test_sizes_without_bounds_have_no_guard(tmp_path: Path) -> None:
    _, path = written(program(FREE), tmp_path)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Relu"]


def test_bounds_of_a_size_that_is_no_axis_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="size T is not an axis of any input by itself"):
        running(program(UNKNOWN), tmp_path)
