"""Backends and rules from outside the package, and the backend without code."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from torch import nn
from tvm import relax
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

import moec
from moec.codegen.backend import Rule, require
from moec.codegen.backends import backend_for, registry
from moec.codegen.backends.cpu.backend import CPU
from moec.codegen.module_builder import Lowering
from moec.errors import TargetError, UsageError
from moec.ir.graph import Graph, Op
from moec.target.cpu import host
from tests.capture.modules import WIDTH, Moe

x = torch.randn(5, 8)


def check_relu(op: Op, graph: Graph) -> None:
    require(op.inputs[0].dtype == "f32", "it reads something else than f32")


def emit_relu(low: Lowering, op: Op) -> list[relax.Expr]:
    """max(x, 0) of x[T, 8], by a kernel of our own."""

    def kernel(name: str) -> object:
        with IRBuilder() as builder:
            with T.prim_func():
                T.func_name(name)
                T.func_attr({"global_symbol": name})
                rows = T.int64()
                a = T.match_buffer(T.arg("a", T.handle()), (rows, 8), "float32")
                b = T.match_buffer(T.arg("b", T.handle()), (rows, 8), "float32")
                with T.serial(0, rows) as i, T.serial(0, 8) as j:
                    T.buffer_store(b, T.max(a[i, j], T.float32(0)), [i, j])
        return builder.get()

    low.note(op, "my relu")
    function = low.function("my relu", "my_relu", kernel)  # type: ignore[arg-type]
    return low.call(function, [low.value(op.inputs[0])], [op.outputs[0].type])


MINE = replace(CPU, rules=(Rule("my relu", ("aten.relu.default",), check_relu, emit_relu),))


def test_a_kernel_of_ones_own_is_tried_first() -> None:
    backend = replace(CPU, rules=(*MINE.rules, *CPU.rules))
    compiled = moec.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (x,), backend=backend)
    assert compiled.report().kernels == {"linear": 1, "my relu": 1}


def test_the_report_says_why_a_kernel_refused() -> None:
    compiled = moec.compile(nn.ReLU(), (x.double(),), backend=MINE)
    (line,) = compiled.report().loops
    assert (line.op, line.reason) == (
        "aten.relu.default",
        "my relu: it reads something else than f32",
    )
    text = " ".join(str(compiled.report()).split())
    assert "Run as plain loops, without a kernel" in text
    assert "it reads something else than f32" in text


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a package does whose pyproject has [project.entry-points."moec.backends"]."""
    entry = EntryPoint("mine", f"{__name__}:OUTSIDE", "moec.backends")
    monkeypatch.setattr(EntryPoint, "load", lambda self: OUTSIDE)
    monkeypatch.setattr(registry, "entry_points", lambda **how: EntryPoints([entry]).select(**how))


OUTSIDE = replace(CPU, kind="mine")


def test_a_backend_that_a_package_registers(installed: None) -> None:
    target = replace(host(), name="my-cpu", kind="mine")
    assert backend_for(target) is OUTSIDE
    compiled = moec.compile(nn.Linear(8, 4), (x,), target=target)
    assert compiled.report().kernels == {"linear": 1}


def test_a_kind_that_nobody_registered() -> None:
    target = replace(host(), name="my-npu", kind="npu")
    with pytest.raises(TargetError, match="'my-npu': there is no backend 'npu', only cpu, null"):
        moec.compile(nn.Linear(8, 4), (x,), target=target)


def test_the_null_target_makes_no_code(tmp_path: Path) -> None:
    compiled = moec.compile(Moe(), (torch.randn(5, WIDTH),), target="null", verify=False)
    report = compiled.report()
    assert len(report.blocks) == 1
    assert report.kernels["gate"] == 1
    assert report.bytes_out
    with pytest.raises(UsageError, match="the target 'null' generates no code"):
        compiled(torch.randn(5, WIDTH))
    compiled.save(tmp_path / "null.moec")


def test_the_null_target_has_nothing_to_verify() -> None:
    with pytest.raises(UsageError, match="nothing to verify: switch verification off"):
        moec.compile(nn.Linear(8, 4), (x,), target="null")
