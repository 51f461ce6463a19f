"""Opens an ONNX file: its graph as a module, example inputs, and the sizes that may vary.

ONNX Runtime is the oracle of what the file means: the module is compared with it on drawn inputs of
two kinds of sizes before anything else is done with it. What follows, the graph and the code, is
compared with the module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.oracle.tolerance import distance
from moec.sources.onnx.module import OnnxModule
from moec.sources.onnx.operators import dtype_of

EXAMPLE, OTHERS = (2, 5, 7, 11, 13), (3, 1, 4, 9, 6)
"""Lengths of named sizes, in the order in which the inputs name them."""
_MOST = 1 << 27
"""The most elements of an input."""
_ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-6}
_ALLOWED_16_BITS = 2e-2


@dataclass(frozen=True)
class OnnxModel:
    """A file's module, its example inputs by name, and for each input the names of axes."""

    module: OnnxModule
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]
    notes: tuple[str, ...]


def open_onnx(path: Path) -> OnnxModel:
    """The model of a file. Raises CaptureError, naming the file, where it cannot be read, has
    operators that moec does not read, or computes something else in ONNX Runtime."""
    try:
        model = onnx.inliner.inline_local_functions(onnx.load(str(path)))
    except Exception as error:  # of protobuf, the inliner, or the files of weights
        words = " ".join(str(error).split())
        raise CaptureError(f"{path} cannot be read as an ONNX file: {words}") from error
    try:
        _check_names(model.graph)
        module = OnnxModule(model).eval()
        weights = {initializer.name for initializer in model.graph.initializer}
        ports = [value for value in model.graph.input if value.name not in weights]
        inputs = _inputs(ports, EXAMPLE)
        _compare(path, module, [inputs, _inputs(ports, OTHERS)])
    except CaptureError as error:
        remedy = "; moec export wrote this file: compile the model that it was written from"
        raise CaptureError(
            f"{path}: {error}{remedy if model.producer_name == 'moec' else ''}"
        ) from error
    notes = (f"{path.name}: read as ONNX Runtime computes it, compared on two drawn inputs",)
    return OnnxModel(module, inputs, {port.name: _axes(port) for port in ports}, notes)


def _check_names(graph: onnx.GraphProto) -> None:
    """Raises CaptureError for the first name that is no text: protobuf gives it as bytes."""
    ports = (*graph.input, *graph.output)
    names = [part.name for part in (*ports, *graph.initializer)]
    names += [dim.dim_param for port in ports for dim in port.type.tensor_type.shape.dim]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
    broken = next((name for name in names if not isinstance(name, str)), None)
    if broken is not None:
        raise CaptureError(f"the name {broken!r} is not in UTF-8")


def _axes(port: onnx.ValueInfoProto) -> dict[int, str]:
    dims = port.type.tensor_type.shape.dim
    return {axis: _identifier(dim.dim_param) for axis, dim in enumerate(dims) if dim.dim_param}


def _identifier(name: str) -> str:
    word = re.sub(r"\W", "_", name)
    return word if word.isidentifier() else f"size_{word}"


def _inputs(ports: Sequence[onnx.ValueInfoProto], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Drawn inputs: floats normal, integers 0 or 1, truths true."""
    named = list(dict.fromkeys(name for port in ports for name in _axes(port).values()))
    if len(named) > len(lengths):
        raise CaptureError(f"its inputs name more than {len(lengths)} sizes: {', '.join(named)}")
    sizes = dict(zip(named, lengths, strict=False))
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for port in ports:
        shape = list(_shape(port, sizes))
        if math.prod(shape) > _MOST:
            raise CaptureError(f"the input {port.name} is too large for an example: {shape}")
        try:
            dtype = dtype_of(port.type.tensor_type.elem_type)
        except NotImplementedError as error:
            raise CaptureError(f"the input {port.name}: {error}") from error
        if dtype.is_floating_point:
            inputs[port.name] = torch.randn(shape, generator=generator).to(dtype)
        elif dtype == torch.bool:
            inputs[port.name] = torch.ones(shape, dtype=dtype)
        else:
            inputs[port.name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return inputs


def _shape(port: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> Iterator[int]:
    if not port.type.tensor_type.HasField("shape"):
        raise CaptureError(f"the input {port.name} is no tensor of a known rank")
    for axis, dim in enumerate(port.type.tensor_type.shape.dim):
        if dim.dim_param:
            yield sizes[_identifier(dim.dim_param)]
        elif dim.dim_value > 0:
            yield dim.dim_value
        else:
            raise CaptureError(f"the input {port.name} has no name for its axis {axis}")


def _compare(path: Path, module: OnnxModule, cases: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises CaptureError where ONNX Runtime computes something else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        for case in cases:
            arrays = {name: tensor.numpy() for name, tensor in case.items()}
            expected = [torch.from_numpy(each) for each in session.run(None, arrays)]
            with torch.no_grad():
                results = module(**case)
            for (name, ours), theirs in zip(results.items(), expected, strict=True):
                if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                    raise CaptureError(f"ONNX Runtime gives {name} another shape or type")
                error, allowed = distance(ours, theirs), _ALLOWED.get(ours.dtype, _ALLOWED_16_BITS)
                if not error <= allowed:
                    raise CaptureError(
                        f"ONNX Runtime computes another {name}: the error is {error:.1e} of "
                        f"{allowed:.0e} allowed"
                    )
    except CaptureError:
        raise
    except Exception as error:  # of ONNX Runtime, or of torch where a node's inputs do not fit
        words = " ".join(str(error).split())[:300]
        raise CaptureError(f"it cannot be compared with ONNX Runtime: {words}") from error
