"""Sizes that the runtime computes, in machine code that takes them as names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.codegen.host_sizes import with_host_sizes
from moec.errors import InputError
from moec.ir.sizes.dims import parse_dim, show_dim
from moec.ir.text import parse, print_graph
from moec.runtime.sizes.expressions import value_of_size

TEXT = """graph main(x: f32[T, 8], size_0: f32[S]) {
  size T in [1, inf]
  size S in [0, inf]
  first: f32[Min(T, isqrt(T)), 8] = aten.slice.Tensor(x) <end={isqrt(T)}>
  zeros: f32[Max(1, floor(f64(3*log(T)/2))), 4*isqrt(T) + S] = aten.full.default() \
<size=({Max(1, floor(f64(3*log(T)/2)))}, {4*isqrt(T) + S}), fill_value=0.0>
  whole: f32[floor(36028797018963968*T/3602879701896397)] = aten.full.default() \
<size=({floor(36028797018963968*T/3602879701896397)},), fill_value=0.0>
  half: f32[floor(T/2)] = aten.full.default() <size=({floor(T/2)},), fill_value=0.0>
  return first, zeros, whole, half
}
"""


def test_each_function_becomes_one_name() -> None:
    graph, host_sizes = with_host_sizes(parse(TEXT))
    names = {show_dim(size): name for name, size in host_sizes.items()}
    assert len(names) == 3
    root, log = names["isqrt(T)"], names["floor(f64(3*log(T)/2))"]
    text = print_graph(graph)
    shapes = [[show_dim(dim) for dim in value.shape] for value in graph.outputs]
    quotient = names["floor(36028797018963968*T/3602879701896397)"]
    width = show_dim(parse_dim(f"4*{root} + S"))
    assert shapes == [
        [f"Min(T, {root})", "8"],
        [f"Max(1, {log})", width],
        [quotient],
        ["floor(T/2)"],
    ]
    assert "isqrt" not in text
    assert "log" not in text


def test_a_graph_without_them_stays() -> None:
    graph = parse("graph main(x: f32[T]) {\n  size T in [0, inf]\n  return x\n}\n")
    assert with_host_sizes(graph) == (graph, {})


class Roots(nn.Module):
    """Rows, a capacity and a width that depend on roots, powers and floats."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        root, most = math.isqrt(n), int(n**0.75)
        position = torch.arange(n)
        return (
            x[:root].relu(),
            x * (position < most)[:, None],
            (x.sum() + torch.arange(n // root)) * root,
            torch.zeros(max(1, int(n * 1.3 // 3))) + x.sum(),
        )


def test_machine_code_has_the_sizes_of_python(tmp_path: Path) -> None:
    compiled = moec.compile(Roots().eval(), (torch.randn(6, 4),), verify=False)
    compiled.save(tmp_path / "roots.moec")
    loaded = moec.load(tmp_path / "roots.moec")
    for n in (1, 2, 3, 4, 8, 9, 26, 27, 81, 243, 256, 257):
        x = torch.randn(n, 4)
        expected = Roots()(x)
        torch.testing.assert_close(tuple(compiled(x)), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tuple(loaded(x).values()), expected, rtol=1e-4, atol=1e-4)


def test_a_size_without_a_value_is_an_error() -> None:
    assert value_of_size("isqrt(T) + S", "S T", (3, 17)) == 7
    with pytest.raises(ValueError, match=r"the size floor\(log\(T\)\) has no value where T = 0"):
        value_of_size("floor(log(T))", "T", (0,))
    compiled = moec.compile(Roots().eval(), (torch.randn(6, 4),), verify=False)
    with pytest.raises(InputError, match=r"T at least 1 \(test_host_sizes\.py:.*n // root"):
        compiled(torch.randn(0, 4))
