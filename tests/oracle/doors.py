"""The doors through which a layer of `tests.oracle.second_inputs` is compiled: for each a function
from (layer, a private folder) to what runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moec
import moec.dynamo  # registers the backend where moec is not installed
from moec.errors import MoecError, UsageError
from moec.export.onnx import open_session, runner
from tests.command_line import invoke
from tests.fuzz.judge import interpreted
from tests.oracle.experts import Routed
from tests.oracle.values import example, parameters

Run = Callable[..., Any]
Door = Callable[[Routed, Path], Run]


def captured(module: Routed, folder: Path) -> Run:
    """The graph after all passes, interpreted."""
    return interpreted(moec.compile(module, example(module), build=False, verify=False))


def compiled(module: Routed, folder: Path) -> Run:
    return moec.compile(module, example(module))


def command(module: Routed, folder: Path) -> Run:
    """`moec compile`, and the file that it writes."""
    name = type(module).__name__
    (folder / "layer.py").write_text(
        "from tests.oracle.second_inputs import layer\n"
        "from tests.oracle.values import example\n\n\n"
        f"def build():\n    module = layer({name!r})\n    return module, example(module)\n"
    )
    arguments = ["compile", f"{folder / 'layer.py'}:build", "-o", str(folder / "layer.moec")]
    result = invoke(*arguments)
    if result.exit_code:
        raise MoecError(result.output)
    return moec.load(folder / "layer.moec")


def pt2(module: Routed, folder: Path) -> Run:
    """A file of torch.export, which declares the sizes: it has the side of the example only."""
    tensors = example(module)
    shapes = tuple(dict.fromkeys(range(t.ndim), torch.export.Dim.AUTO) for t in tensors)
    try:
        exported = torch.export.export(module, tensors, dynamic_shapes=shapes)
    except Exception as error:  # a branch on values, for example
        raise UsageError(f"torch.export: {error}") from error
    torch.export.save(exported, folder / "layer.pt2")
    return interpreted(moec.compile(folder / "layer.pt2", build=False, verify=False))


def dynamo(module: Routed, folder: Path) -> Run:
    torch._dynamo.reset()
    moec.stats(reset=True)
    options = {"rest": "eager"}
    run: Run = torch.compile(module, backend="moec", dynamic=True, options=options)
    return run


def onnx(module: Routed, folder: Path) -> Run:
    """At the sizes that the file is for, which are those of the graph."""
    model = moec.compile(module, example(module), build=False)
    model.export_onnx(folder / "layer.onnx")
    graph, run = interpreted(model), runner(open_session(folder / "layer.onnx"))

    def call(*tensors: Tensor) -> Any:
        graph(*tensors)
        return [*run(dict(zip(parameters(module), tensors, strict=True))).values()]

    return call


DOORS: dict[str, Door] = {
    "graph": captured,
    "code": compiled,
    "command": command,
    "pt2": pt2,
    "torch.compile": dynamo,
    "onnx": onnx,
}
