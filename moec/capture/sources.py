"""Where in the user's code something stands, and sizes in the user's words."""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = str(Path(torch.__file__).parent)
_MOEC = str(Path(__file__).parent)


def user_line(node: torch.fx.Node) -> str:
    """The innermost line of the user's that made a node, as file.py:12, or the node's name."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    user_frames = [f"{Path(file).name}:{line}" for file, line in frames if not is_internal(file)]
    return user_frames[-1] if user_frames else node.name


def is_internal(file: str) -> bool:
    """Whether code is torch's or moec's and not the user's."""
    return file.startswith((_TORCH, _MOEC, "<"))


def text_of(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()


def named(expr: Any, names: Mapping[str, str]) -> str:
    """An expression of torch with each of its symbols under its name in `names`."""
    return re.sub(r"\b[a-z]+\d+\b", lambda match: names.get(match[0], match[0]), str(expr))
