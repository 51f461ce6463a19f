"""The user's line of code for a node, and sizes under the user's names."""

from __future__ import annotations

import linecache
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_TORCH = str(Path(torch.__file__).parent)
_MOEC = str(Path(__file__).parents[2])


def user_line(node: torch.fx.Node) -> str:
    """The user's innermost line that created a node, as file.py:12, or else the node's name."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    user_frames = [f"{Path(file).name}:{line}" for file, line in frames if not is_internal(file)]
    return user_frames[-1] if user_frames else node.name


def user_code(node: torch.fx.Node) -> str:
    """The user's innermost line that created a node, as "file.py:12: `text`"; empty if unknown."""
    for file, line in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        if not is_internal(file):
            text = text_of(file, int(line))
            return f"{Path(file).name}:{line}" + (f": `{text}`" if text else "")
    return ""


def is_internal(file: str) -> bool:
    """Whether a file belongs to torch or moec and not to the user."""
    return file.startswith((_TORCH, _MOEC, "<"))


def is_own(file: str) -> bool:
    """Whether a file belongs to moec."""
    return file.startswith(_MOEC)


def is_standard(file: str) -> bool:
    """Whether a file is of the standard library, or code that it generates (of a dataclass)."""
    library = file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
    return library or file == "<string>"


def package_of(file: str) -> str:
    """The installed package of a file; "" for a file of the user's."""
    _, installed, rest = file.rpartition("-packages/")
    return rest.split("/")[0].removesuffix(".py") if installed else ""


def packages_of(module: torch.nn.Module) -> frozenset[str]:
    """The packages of the classes of a module and its submodules."""
    names = {kind.__module__ or "" for part in module.modules() for kind in type(part).__mro__}
    return frozenset(name.split(".")[0] for name in names)


def text_of(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()


def named(expr: Any, names: Mapping[str, str]) -> str:
    """torch's expression as text, with each symbol replaced by its name in `names`."""
    return re.sub(r"\b[a-z]+\d+\b", lambda match: names.get(match[0], match[0]), str(expr))
