"""Opens a model: a module, an export, or the path of a checkpoint, a .pt2 file or a factory.

Each kind becomes a `Source`: a module or an export, with example arguments.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.capture.behaviour.describe import Declared, capture_described
from moec.capture.capture import capture
from moec.capture.captured import Captured
from moec.capture.earlier_calls.other_inputs import capture_stateless
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.capture.language_models import checkpoint_source, gguf_source
from moec.capture.pt2 import check_archive
from moec.capture.source import Source, described_error, example_of, module_source, traceable
from moec.errors import CaptureError, UsageError
from moec.files.adapter import read_adapter
from moec.memory.budget import allowed_bytes
from moec.model_path import kind_of_model
from moec.runtime.process.byte_sizes import MOST_MEMORY


def capture_source(
    source: Source,
    dynamic_shapes: Any = None,
    allow_fixed: bool | str | Collection[str] = False,
    declared: Sequence[Declared] = (),
    constants: str | Collection[str] = (),
) -> Captured:
    """`capture` of a source, with the sizes of the source unless `dynamic_shapes` is given.

    Descriptions in `declared` are proved first. Raises UsageError where a graph is to be
    described or to have constants.
    """
    run = partial(
        capture,
        source.model,
        source.args,
        source.kwargs,
        dynamic_shapes=source.dynamic_shapes if dynamic_shapes is None else dynamic_shapes,
        bounds=source.bounds if dynamic_shapes is None else None,
        allow_fixed=allow_fixed,
        constants=constants,
    )
    if not traceable(source):
        if constants:
            raise UsageError(f"{source.name} is a graph already: it has no constant inputs")
        if declared:
            raise UsageError(f"{source.name} is a graph already: nothing is left to describe")
        return run()
    example = example_of(source)
    example.module.eval()
    captured = capture_stateless(
        earlier_calls(example.module, source.args, source.kwargs),
        partial(capture_described, example, run, declared),
    )
    return replace(captured, notes=(*source.notes, *captured.notes))


def open_source(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    adapters: Sequence[str | Path] = (),
    memory: int | str | None = MOST_MEMORY,
) -> Source:
    """The source for any model that moec accepts. Arguments given here replace the example inputs
    of a checkpoint or an export; `adapters` are folders, merged into a checkpoint in order. A
    checkpoint whose compilation needs more than `memory` (`allowed_bytes`) is not read into memory
    at once; another model has no such limit.

    Raises UsageError where `model` is of no supported kind, CaptureError where it cannot be loaded.
    """
    args, kwargs, limit = tuple(args), dict(kwargs or {}), allowed_bytes(memory)
    configs = tuple(read_adapter(Path(folder)) for folder in adapters)
    kind = kind_of_model(str(model)) if isinstance(model, str | Path) else "module"
    if memory not in (None, MOST_MEMORY) and kind not in ("checkpoint", "gguf", "hub"):
        raise UsageError(
            "memory (--memory) limits the compilation of checkpoints and GGUF files, whose weights "
            "can stay in files: leave it out, or save the model as a checkpoint"
        )
    if configs and kind not in ("checkpoint", "gguf"):
        raise UsageError(
            "adapters are merged into checkpoints and GGUF files: give one of these, or merge them "
            "into the module with PEFT (merge_and_unload)"
        )
    if isinstance(model, torch.nn.Module):
        return module_source(model, args, kwargs)
    if isinstance(model, ExportedProgram):
        return Source(model, args, kwargs, name="an exported program")
    if not isinstance(model, str | Path):
        raise UsageError(
            f"a {type(model).__name__} is not a model: give a torch module, an exported program, "
            "the folder of a checkpoint, a .gguf, .pt2 or .onnx file, or file.py:factory"
        )
    text = str(model)
    match kind:
        case "factory":
            if args or kwargs:
                raise UsageError(f"{text}: the factory gives the example inputs: leave yours out")
            file, _, factory = text.rpartition(":")
            return _factory(Path(file), factory)
        case "checkpoint":
            return checkpoint_source(Path(text), args, kwargs, configs, limit)
        case "gguf":
            return gguf_source(Path(text), args, kwargs, configs, limit)
        case "pt2":
            return replace(_export(Path(text)), args=args, kwargs=kwargs)
        case "onnx":
            return _onnx(Path(text), args, kwargs)
        case _:
            raise UsageError(f"{text} does not exist: here, give a path and no id of the hub")


def _export(path: Path) -> Source:
    check_archive(path)
    try:
        return Source(torch.export.load(str(path)), name=path.name)
    except Exception as error:
        raise CaptureError(
            f"{path} cannot be read as a torch.export program: {error}; save it again with "
            "torch.export.save, with this version of torch"
        ) from error


def _onnx(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source:
    """The source of an ONNX file. Its inputs are given by name; named sizes vary."""
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{path}: reading ONNX needs {package}: pip install 'moec[onnx]'")
    from moec.onnx_source import open_onnx

    model = open_onnx(path)
    inputs = kwargs | dict(zip(model.inputs, args, strict=False)) or dict(model.inputs)
    shapes = {name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in model.axes.items()}
    return Source(model.module, (), inputs, shapes, name=path.name, notes=model.notes)


def _factory(path: Path, name: str) -> Source:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CaptureError(f"{path} fails as it is loaded: {described_error(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"{path} has no function {name}")
    try:
        returned = factory()
    except Exception as error:
        raise CaptureError(f"{path}:{name}() fails: {described_error(error)}") from error
    if not (
        isinstance(returned, tuple)
        and len(returned) in (2, 3)
        and isinstance(returned[0], torch.nn.Module)
        and isinstance(returned[1], tuple | dict)
    ):
        raise UsageError(
            f"{path}:{name}() must return (module, arguments) or (module, arguments, "
            "dynamic_shapes), with the arguments in a tuple or a dict"
        )
    model, arguments, *shapes = returned
    args = arguments if isinstance(arguments, tuple) else ()
    kwargs = arguments if isinstance(arguments, dict) else {}
    source = module_source(model, args, dict(kwargs))
    return Source(
        source.model, source.args, source.kwargs, shapes[0] if shapes else None, name=name
    )
