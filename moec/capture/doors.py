"""Opens a model: a module, an export, or the path of a checkpoint, a .pt2 file or a factory.

Each kind becomes a `Source`: a module or an export, with example arguments.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from moec.capture.source import Source, described_error, example_of, module_source, traceable
from moec.errors import CaptureError, SetupError, UsageError
from moec.files.adapter import read_adapter
from moec.model_path import kind_of_model
from moec.runtime.process.byte_sizes import MOST_MEMORY
from moec.sources.memory.budget import allowed_bytes

# Checks a .pt2 file before torch reads it: it may hold tensors and a graph, but no code.
#
# `torch.export.load` unpickles sample inputs and weights, loads compiled libraries, evaluates the
# texts of sizes with sympy, and looks up the targets of nodes by name. The file is therefore
# inspected first, without any of these steps, and refused where it needs more than:
#
#     pickles            that torch.load(weights_only=True) reads: tensors and plain containers
#     targets of nodes   operators under torch.ops, torch.sym_*, operator.* and math.*
#     sizes and guards   arithmetic of names, numbers and known functions
#     tree specs         without types that are found by importing a module

_LARGEST_TEXT = 1 << 30  # bytes of one JSON member
_TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|prim|moec|higher_order|_quantized|quantized_decomposed|mkldnn)\.[\w.]+"
    r"|torch\.(sym_\w+|_sym_\w+|_higher_order_ops\.[\w.]+)|_operator\.[a-z]\w*|math\.[a-z]\w*"
)
_FUNCTIONS = {
    *("Symbol", "Integer", "Float", "Rational", "Mul", "Add", "Pow", "Max", "Min", "Mod", "Abs"),
    *("floor", "ceiling", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
    *("ExprCondPair", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilDiv"),
    *("CeilToInt", "FloorToInt", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv"),
    *("IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt"),
    *("RoundToInt", "RoundDecimal", "ToFloat", "Identity", "len", "min", "max", "abs", "int"),
    *("round", "float", "not"),
}
_SYNTAX = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.BinOp),
    *(ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Attribute, ast.Tuple, ast.IfExp),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def check_archive(path: Path) -> None:
    """Raises CaptureError, naming the offending member, where reading the file could run code."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch ignores the case of member names; which of two equal ones it reads is not
            # defined.
            if len({member.filename.lower() for member in members}) < len(members):
                raise _refusal(path, "the archive", "two of its members have one name")
            for member in members:
                _check_member(path, archive, member)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, RecursionError) as error:
        raise CaptureError(
            f"{path} cannot be read as a torch.export program: {error}; save it again with "
            "torch.export.save"
        ) from error


def _check_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    name = member.filename.lower()
    if "/data/aotinductor/" in f"/{name}":
        raise _refusal(path, name, "it is compiled code")
    if re.search(r"(^|/)(custom_obj|opaque_obj)_", name):
        raise _refusal(path, name, "it is a pickled object")
    if name.endswith(".pt"):
        _check_pickle(path, name, archive.read(member))
    elif name.endswith(".json"):
        if member.file_size > _LARGEST_TEXT:
            raise CaptureError(f"{path}: {name} has {member.file_size} bytes, more than any graph")
        document = json.loads(archive.read(member))
        folder = member.filename.rpartition("/")[0]
        for entry in _dicts(document):
            if entry.get("use_pickle"):
                part = f"{folder}/{entry.get('path_name')}"
                _check_pickle(path, part, archive.read(part))
            _check_texts(path, name, entry)


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception:
        raise _refusal(path, name, "it holds Python objects that unpickling would make") from None


def _check_texts(path: Path, name: str, entry: dict[str, Any]) -> None:
    target = entry.get("target")
    if isinstance(target, str) and "inputs" in entry and not _TARGETS.fullmatch(target):
        raise _refusal(path, name, f"a node calls {target!r}")
    texts = [entry.get("expr_str"), *_listed(entry.get("guards_code"))]
    for text in texts:
        if isinstance(text, str) and not _is_arithmetic(text):
            raise _refusal(path, name, f"{text!r} is more than the arithmetic of a size")
    for spec in (entry.get("in_spec"), entry.get("out_spec")):
        if isinstance(spec, str) and re.search(r"default_factory|__enum__|\\u", spec):
            raise _refusal(path, name, "its arguments have a type that importing a module finds")


def _is_arithmetic(text: str) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SYNTAX):
            return False
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            return False
        if isinstance(node, ast.Call) and not _is_known(node.func):
            return False
    return True


def _is_known(function: ast.expr) -> bool:
    """Whether it is a known function, one of math, a sym_ function of torch, or a method such as
    `.size()` of an input."""
    match function:
        case ast.Name(id=name):
            return name in _FUNCTIONS
        case ast.Attribute(value=ast.Name(id="math")):
            return True
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return name.startswith("sym_")
        case ast.Attribute(attr=name):
            return name in ("size", "stride", "storage_offset", "dim", "numel")
    return False


def _dicts(document: Any) -> Iterator[dict[str, Any]]:
    pending = [document]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _refusal(path: Path, name: str, why: str) -> CaptureError:
    return CaptureError(
        f"{path} is not read, since reading it could run code: {name}: {why}. If you trust the "
        "file, load it yourself with torch.export.load and give the program to moec.compile"
    )


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
            raise SetupError(f"{text} does not exist: here, give a path and no id of the hub")


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
            raise SetupError(f"{path}: reading ONNX needs {package}: pip install 'moec[onnx]'")
    from moec.sources.onnx import open_onnx

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
        raise SetupError(f"{path} has no function {name}")
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
        raise SetupError(
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
