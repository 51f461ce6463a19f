"""Composite operators replaced one by one give the result of torch's own decomposition."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, _symbolic_trace
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moec.capture import capture
from moec.capture.conversion.exported import to_program
from moec.capture.decomposition import decompose, decompositions
from moec.capture.decomposition.expand import expand
from moec.codegen.loops.emit import EMIT
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import print_graph

_NAME = re.compile(r"([A-Za-z_][\w.]*): (?=[a-z0-9]+\[)")


class Function(nn.Module):
    """A module of one function of x[T, 8] and a weight [8, 8]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def halves(x: Tensor, weight: Tensor) -> Tensor:
    first, second = (x @ weight).chunk(2, dim=-1)
    return first * second.contiguous().to(torch.float64).float()


def divided(x: Tensor, weight: Tensor) -> Tensor:
    values, _ = x.topk(2, dim=-1)
    values /= values.sum(-1, keepdim=True)
    return values.reshape(-1)


def twice(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    z = y.add_(1).mul_(x)
    return y + z.mul_(2) + y


def filled(x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], 12)
    y[:, :8] = x
    y[:, 8:] = x[:, :4]
    y[:, 3] += 1
    return y


def scattered(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    rows, columns = torch.where(x > 0)
    y.index_put_((rows, columns), x[rows, columns])
    return y.masked_fill_(x > 1, 3.0)


def dropped(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.nn.functional.dropout(x * 2, 0.5, training=False)
    return torch.nn.functional.rms_norm(y, (8,), weight[0]) + torch.einsum("td,de->te", y, weight)


REPLACED = [halves, divided, twice, filled, scattered, dropped]


def viewed(x: Tensor, weight: Tensor) -> Tensor:
    y = x + 1
    row = y.view(-1)
    y.add_(1)
    return row * 2


def through_a_view(x: Tensor, weight: Tensor) -> Tensor:
    y = x + 1
    y.view(-1).mul_(3)
    return y


def same_by_dropout(x: Tensor, weight: Tensor) -> Tensor:
    y = x + 1
    z = torch.nn.functional.dropout(y, 0.5, training=False)
    y.add_(1)
    return y * z


def same_by_einsum(x: Tensor, weight: Tensor) -> Tensor:
    y = x + 1
    z = torch.einsum("td->dt", y)
    y.add_(1)
    return z.T * 2


def part_read_later(x: Tensor, weight: Tensor) -> Tensor:
    y = x + 1
    part = y[:, :4]
    y[:, :4] = 0.0
    return y.sum(-1) + part.sum(-1)


def written_as_result(x: Tensor, weight: Tensor) -> Tensor:
    y = x + 1
    part = y[:, :4].mul_(2)
    y.add_(1)
    return part + y[:, :4]


def narrower(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.zeros_like(x, dtype=torch.float16)
    y.add_(x)
    return y.float()


LEFT_TO_TORCH = [
    narrower,
    viewed,
    through_a_view,
    same_by_dropout,
    same_by_einsum,
    part_read_later,
    written_as_result,
]


LOST = [same_by_dropout]
"""torch.export takes the result of dropout for new memory: verification against eager finds it."""


def decompose_by_torch(program: ExportedProgram) -> ExportedProgram:
    result: ExportedProgram = program.run_decompositions(decompositions())
    return result


def exported(function: Callable[[Tensor, Tensor], Tensor]) -> ExportedProgram:
    torch.manual_seed(0)
    module = Function(function).eval()
    with torch.no_grad():
        return export(module, (torch.randn(5, 8),), dynamic_shapes=({0: Dim.AUTO},), strict=False)


def text(program: ExportedProgram) -> str:
    """The graph with values numbered in order: torch counts its names otherwise."""
    graph = print_graph(to_program(program).graph)
    names: dict[str, str] = {}
    for match in _NAME.finditer(graph):
        names.setdefault(match[1], f"v{len(names)}")
    return re.sub(r"[A-Za-z_][\w.]*", lambda match: names.get(match[0], match[0]), graph)


@pytest.mark.parametrize("function", [f for f in REPLACED if f is not filled])
def test_equal_to_torch(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    program = exported(function)
    expanded = expand(program)
    assert expanded is not None
    assert text(expanded) == text(decompose_by_torch(program))


@pytest.mark.parametrize("function", LEFT_TO_TORCH)
def test_memory_of_two_names_is_left_to_torch(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    program = exported(function)
    assert expand(program) is None
    assert text(decompose(program)) == text(decompose_by_torch(program))


def test_parts_are_written_in_fewer_steps_than_torch_takes() -> None:
    """torch takes every view anew after each write."""
    program = exported(filled)
    expanded = expand(program)
    assert expanded is not None
    ours, torchs = (to_program(p).graph for p in (expanded, decompose_by_torch(program)))
    assert len(ours.ops) < len(torchs.ops)


@pytest.mark.parametrize("function", [*REPLACED, *(f for f in LEFT_TO_TORCH if f not in LOST)])
def test_equal_to_eager(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    program = to_program(decompose(exported(function)))
    for tokens in (2, 5, 7):
        x = torch.randn(tokens, 8)
        weight = next(iter(program.weights.values()), x)
        with torch.no_grad():
            (result,) = evaluate(program.graph, [x], program.weights)
            torch.testing.assert_close(result, function(x, weight))


def test_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return make_fx(*args, **kwargs)

    monkeypatch.setattr(sys.modules["moec.capture.decomposition.expand"], "make_fx", counted)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)) for _ in range(9)))
    with torch.no_grad():
        program = export(layers.eval(), (torch.randn(5, 8),), strict=False)
    assert expand(program) is not None
    assert len(calls) == 1


def test_positions_are_written_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over experts has a `where` for each."""

    def rows_above(x: Tensor, weight: Tensor) -> Tensor:
        return torch.where(x > 0)[0]

    program = exported(rows_above)
    module = sys.modules["moec.capture.decomposition.expand"]
    monkeypatch.setattr(module, "make_fx", lambda *_, **__: pytest.fail("a trace"))
    expanded = expand(program)
    assert expanded is not None
    names = [str(node.target) for node in expanded.graph.nodes]
    assert (names.count("aten.nonzero.default"), names.count("aten.squeeze.dims")) == (1, 1)


NORM = nn.BatchNorm1d(8).eval()
NORM.running_mean = torch.linspace(-1, 1, 8)
NORM.running_var = torch.linspace(0.1, 2, 8)
NORMS = (0, 1, 2, 3, math.inf)
WRITTEN_OUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{f"distances in {p}": lambda x, w, p=p: torch.cdist(x, w, p) for p in NORMS},  # type: ignore[misc]
    "distances of stacks": lambda x, w: torch.cdist(x.view(-1, 1, 8), w),
    "a batch norm": lambda x, w: NORM(x),
    "a batch norm of channels": lambda x, w: NORM(x.view(-1, 8, 1) * w[0]),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_operators_without_kernels_are_written_out(name: str) -> None:
    module, x = Function(WRITTEN_OUT[name]).eval(), torch.randn(5, 8)
    captured = capture(module, (x,))
    assert captured.way == "traced"
    assert not {op.name for op in captured.program.graph.ops} & {
        "aten._cdist_forward.default",
        "aten._native_batch_norm_legit_no_training.default",
    }
    (y,) = evaluate(captured.program.graph, [x], captured.program.weights)
    with torch.no_grad():
        torch.testing.assert_close(y, module(x))


def test_which_operators_with_loops_are_decomposed(golden: Callable[[str], None]) -> None:
    """Each version of torch decomposes others; recognition reads what stays, in all versions."""
    golden("\n".join(sorted(EMIT.keys() & map(str, decompositions()))))


def test_a_trace_of_an_operator_does_only_what_its_graph_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing reads memory formats, no module is called, and no graph runs: that took as long as
    the traces."""
    product = Function(lambda x, weight: torch.einsum("td,de->te", x, weight).softmax(-1))
    program = export(product, (torch.randn(3, 8),), dynamic_shapes=({0: Dim("T")},))
    described: list[Tensor] = []
    monkeypatch.setattr(proxy_tensor, "_extract_tensor_metadata", described.append)
    monkeypatch.setattr(_symbolic_trace._Patcher, "patch_method", _refused)
    compiled = counted_code(monkeypatch)
    expanded = expand(program)
    assert expanded is not None
    assert (described, len(compiled)) == ([], 2)  # the graph of all, and that of the program
    assert proxy_tensor._extract_tensor_metadata == described.append
    assert _symbolic_trace._new_patcher.__module__ == _symbolic_trace.__name__


def counted_code(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs whose code is written from now on."""
    compiled: list[GraphModule] = []
    recompile = GraphModule.recompile

    def counted(module: GraphModule) -> Any:
        compiled.append(module)
        return recompile(module)

    monkeypatch.setattr(GraphModule, "recompile", counted)
    return compiled


def _refused(*_: Any, **__: Any) -> None:
    raise AssertionError("a trace replaces a method of all modules")


def test_an_export_looks_for_no_memory_format_and_compiles_no_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    described: list[Tensor] = []
    monkeypatch.setattr(proxy_tensor, "_extract_tensor_metadata", described.append)
    compiled = counted_code(monkeypatch)
    capture(Function(lambda x, weight: x @ weight), (torch.randn(3, 8),))
    assert (described, len(compiled)) == ([], 3)  # the module, and those of the decomposition


class Rolled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.where(x[:, 0] > 0)[0]
        if rows.numel() == 0:
            return x
        return x.index_add(0, rows, x[rows].roll(1, 0))


def test_an_operator_without_parts_is_refused_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"aten.roll.default cannot be decomposed") as refusal:
        capture(Rolled(), (torch.randn(6, 4),))
    assert "`return x.index_add(0, rows, x[rows].roll(1, 0))`" in str(refusal.value)
