"""Division of integers: like eager's where it is defined, and never a trap where it is not (by 0,
and the least integer by -1), since a trap would end the process."""

from __future__ import annotations

import numpy as np
import torch

from moec.codegen.package import build
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from moec.runtime.call.executor import Executor
from moec.target.cpu import host

LEAST = -(2**63)
GRAPH = f"""graph main(a: i64[T], b: i64[T]) {{
  size T in [0, 64]
  floor: i64[T] = aten.floor_divide.default(a, b)
  rest: i64[T] = aten.remainder.Tensor(a, b)
  trunc: i64[T] = aten.div.Tensor_mode(a, b) <rounding_mode="trunc">
  fmod: i64[T] = aten.fmod.Tensor(a, b)
  zero: i64[T] = aten.remainder.Scalar(a) <other=0>
  none: i64[T] = aten.floor_divide.Scalar(a) <other=0>
  least: i64[T] = aten.floor_divide.Scalar(a) <other={LEAST}>
  minus: i64[T] = aten.remainder.Scalar(a) <other=-1>
  negated: i64[T] = aten.floor_divide.Scalar(a) <other=-1>
  return floor, rest, trunc, fmod, zero, none, least, minus, negated
}}
"""


def test_whole_numbers() -> None:
    run = Executor(build(Module.of(Program(parse(GRAPH), {})), host()))
    numbers = [LEAST, LEAST + 1, -7, -1, 0, 1, 3, 2**63 - 1]
    a, b = (torch.tensor(t) for t in zip(*((a, b) for a in numbers for b in numbers), strict=True))
    results = run({"a": a.numpy(), "b": b.numpy()})
    answered = (b != 0) & ~((a == LEAST) & (b == -1))
    a, b = a[answered], b[answered]
    for name, expected in {
        "floor": torch.div(a, b, rounding_mode="floor"),
        "rest": a % b,
        "trunc": torch.div(a, b, rounding_mode="trunc"),
        "fmod": torch.fmod(a, b),
        "least": torch.div(a, LEAST, rounding_mode="floor"),
        "minus": torch.zeros_like(a),
        "negated": -a,
    }.items():
        np.testing.assert_array_equal(results[name][answered.numpy()], expected.numpy(), name)
