"""Runs graphs and modules in ONNX Runtime, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from moec.codegen.onnx import file
from moec.codegen.onnx.lower import OnnxGraph, lower
from moec.codegen.onnx.profiles import PROFILES
from moec.export.onnx import open_session, runner
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse

Run = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]


def written(
    program: Program, folder: Path, opset: int = 23, ep: str = "portable", moe: str = "rows"
) -> tuple[OnnxGraph, Path]:
    """The program as a file that passes the checker."""
    lowered = lower(program.graph, PROFILES[ep], opset, moe)
    path = folder / f"{program.graph.name}-{opset}-{ep}-{moe}.onnx"
    file.write(lowered, program.weights, path, {})
    onnx.checker.check_model(str(path), full_check=True)
    return lowered, path


def running(program: Program, folder: Path, **options: Any) -> Run:
    return runner(open_session(written(program, folder, **options)[1]))


def program(text: str, scale: float = 0.3) -> Program:
    """A graph as text, with random weights."""
    graph = parse(text)
    weights = {p.name: torch.randn([int(str(d)) for d in p.shape]) * scale for p in graph.params}
    return Program(graph, weights)


def agree(
    program: Program, run: Run, inputs: Sequence[Tensor], near: float = 1e-5
) -> tuple[Tensor, ...]:
    """ONNX Runtime's results are those of the graph's meaning in eager PyTorch."""
    graph = program.graph
    expected = evaluate(graph, inputs, program.weights)
    result = run({v.name: t for v, t in zip(graph.inputs, inputs, strict=True)})
    for value, reference in zip(graph.outputs, expected, strict=True):
        torch.testing.assert_close(
            result[value.name], reference, rtol=near, atol=near, equal_nan=True
        )
    return expected
