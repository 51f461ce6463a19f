"""Checks a .pt2 file before torch reads it: it may hold tensors and a graph, but no code.

`torch.export.load` unpickles sample inputs and weights, loads compiled libraries, evaluates the
texts of sizes with sympy, and looks up the targets of nodes by name. The file is therefore
inspected first, without any of these steps, and refused where it needs more than:

    pickles            that torch.load(weights_only=True) reads: tensors and plain containers
    targets of nodes   operators under torch.ops, torch.sym_*, operator.* and math.*
    sizes and guards   arithmetic of names, numbers and known functions
    tree specs         without types that are found by importing a module
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moec.errors import CaptureError

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
