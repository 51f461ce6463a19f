"""ATen ops in ONNX Runtime against torch: the cases of the CPU kernels, and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.codegen.onnx.lower import lower
from moec.codegen.onnx.profiles import PROFILES
from moec.errors import UnsupportedError
from tests.codegen.loops.test_ops import GROUPS, Many, inputs
from tests.codegen.onnx.running import agree, program, running

ABSENT = {
    "shift": "operator aten.__lshift__.Scalar has no ONNX form",
    "windows": "operator aten.unfold.default has no ONNX form",
    "diagonal": "operator aten.diagonal.default has no ONNX form",
    "complex": "operator aten.mul.Tensor has no ONNX form for complex numbers",
    "variance": "operator aten.var.correction has no ONNX form",
    "norm": "operator aten.linalg_vector_norm.default has no ONNX form",
    "cumulative maximum": "operator aten.cummax.default has no ONNX form",
    "add at": "operator aten.index_put.default with indices after a full slice has no ONNX form",
    "copy at": "operator aten.index_put.default with indices after a full slice has no ONNX form",
    "slice scatter": "operator aten.slice_scatter.default with a step has no ONNX form",
    "histogram": "operator aten.histc.default has no ONNX form",
    "convolution": "operator aten.convolution.default has no ONNX form",
}
NOT_IN_NUMPY = {"to bfloat16"}


def captured(names: list[str], group: str):  # type: ignore[no-untyped-def]
    rows = {0: torch.export.Dim("T")}
    module = Many([GROUPS[group][name] for name in names])
    example = tuple(inputs(6, torch.float32).values())
    return capture(module, example, dynamic_shapes={"x": rows, "y": rows, "i": rows})


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("group", GROUPS)
def test_equals_torch(group: str, opset: int, tmp_path: Path) -> None:
    names = [n for n in GROUPS[group] if n not in ABSENT and n not in NOT_IN_NUMPY]
    result = captured(names, group)
    run = running(result.program, tmp_path, opset=opset)
    low = max((b.low for b in result.program.graph.bounds.values()), default=0)
    for rows in (0, 1, 2, 5, 12):
        if rows < low:
            continue
        arguments = inputs(rows, torch.float32)
        results = list(run(arguments).values())
        for name in names:
            expected = GROUPS[group][name](*arguments.values())
            for part in expected if isinstance(expected, tuple) else (expected,):
                value = results.pop(0)
                assert value.dtype == part.dtype, name
                torch.testing.assert_close(
                    value,
                    part.contiguous(),
                    rtol=2e-5,
                    atol=2e-5,
                    equal_nan=True,
                    msg=lambda text, name=name, rows=rows: f"{name} at {rows}: {text}",
                )


@pytest.mark.parametrize("name", ABSENT)
def test_refused(name: str) -> None:
    (group,) = [group for group, cases in GROUPS.items() if name in cases]
    graph = captured([name], group).program.graph
    with pytest.raises(UnsupportedError) as error:
        lower(graph, PROFILES["portable"], 23)
    assert ABSENT[name] in str(error.value)
    assert str(error.value).startswith("the model cannot be exported to ONNX:\n")


def test_everything_is_refused_at_once() -> None:
    graph = captured(["cumulative maximum", "variance"], "reductions").program.graph
    with pytest.raises(UnsupportedError) as error:
        lower(graph, PROFILES["portable"], 23)
    message = str(error.value)
    assert "aten.cummax.default" in message
    assert "aten.var.correction" in message
    assert "(1 time: at " in message


MEANS = """
graph means(x: f32[T, 4]) {
  size T in [0, inf]
  a: f32[] = aten.mean.default(x)
  b: f32[4] = aten.mean.dim(x) <dim=(0), keepdim=false>
  c: f32[1, 1] = aten.mean.dim(x) <dim=(0, 1), keepdim=true>
  d: f32[T] = aten.mean.dim(x) <dim=(1), keepdim=false>
  return a, b, c, d
}
"""


def test_means_of_no_tokens_are_nan(tmp_path: Path) -> None:
    """Such as that of a loss over the tokens; ONNX Runtime's ReduceMean gives 0."""
    means = program(MEANS)
    run = running(means, tmp_path)
    for tokens in (0, 1, 5):
        agree(means, run, [torch.randn(tokens, 4)])


class AddedAt(nn.Module):
    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        zeros = x.new_zeros(4, x.shape[1])
        return (
            zeros.index_add(0, i, x),
            zeros.index_put((i,), x, accumulate=True),
            zeros.scatter_add(0, i[:, None].expand_as(x), x),
            zeros.scatter_reduce(0, i[:, None].expand_as(x), x, "amax"),
        )


def test_halves_are_added_at_positions(tmp_path: Path) -> None:
    """ONNX Runtime adds no float16 at positions on CPUs: the file did not load or did not run."""
    x, i = torch.randn(9, 4).half(), torch.randint(0, 4, (9,))
    run = running(capture(AddedAt(), (x, i)).program, tmp_path)
    for result, expected in zip(run({"x": x, "i": i}).values(), AddedAt()(x, i), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)


class Divided(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x // y, x % y, x // 0.1, x % -0.7, torch.div(x, y, rounding_mode="floor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_are_divided_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """A quotient that is rounded before its floor is taken is 1 too great: 1 // 0.1 is 9."""
    marks = torch.tensor([1, -1, 0.1, -0.1, 3, -7.5, 0, math.inf, -math.inf, math.nan])
    x, y = torch.cartesian_prod(marks, marks).to(dtype).T.contiguous()
    run = running(capture(Divided(), (x, y)).program, tmp_path)
    for result, expected in zip(run({"x": x, "y": y}).values(), Divided()(x, y), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
