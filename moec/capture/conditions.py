"""Conditions on whether a mask is set anywhere, which torch.export cannot trace.

    if mask.any(): ...                      if mask.sum() == 0: continue
    if counts[expert] > 0: ...              if len(torch.where(mask)[0]) == 0: continue

`Conditions(assumed=True)` answers each as where some rows are there. That is right only where the
code that a condition guards does nothing without rows, so a run of the module under
`Conditions(assumed=False)`, which changes nothing, tells which conditions skipped theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

Kind = Literal["count", "some", "none", "rows"]
"""What a tensor tells of rows: how many there are, whether there are some, whether there are none,
which they are."""

_COUNTS = ("sum", "count_nonzero", "bincount", "histc")
_KEPT = ("getitem", "select", "cpu", "to", "long", "int", "clone", "detach")
_COMPARED: Mapping[tuple[str, int], Kind] = {
    ("gt", 0): "some",
    ("ge", 1): "some",
    ("ne", 0): "some",
    ("eq", 0): "none",
    ("lt", 1): "none",
    ("le", 0): "none",
}
_OPPOSITE: Mapping[Kind, Kind] = {"some": "none", "none": "some"}
_OWN = (str(Path(torch.__file__).parent), __file__)


@dataclass(frozen=True)
class Place:
    """A line of somebody's code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


class Conditions(TorchFunctionMode):
    """`met` are the places of conditions on masks, `skipped` those that found no rows once."""

    def __init__(self, assumed: bool) -> None:
        super().__init__()
        self.assumed = assumed
        self.met: dict[Place, None] = {}
        self.skipped: set[Place] = set()
        self._known: dict[int, tuple[torch.Tensor, Kind]] = {}  # with the tensor: ids are reused

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "").strip("_")
        subject = args[0] if args and isinstance(args[0], torch.Tensor) else None
        kind = self._known[id(subject)][1] if id(subject) in self._known else None
        if name == "bool" and kind is not None:
            return self._answer(bool(func(subject)) if not self.assumed else kind != "none", kind)
        if name == "len" and kind == "rows":
            return self._answer(func(subject) if not self.assumed else 1, kind)
        result = func(*args, **kwargs)
        if name in ("nonzero", "where") and not (name == "where" and len(args) > 1):
            for rows in result if isinstance(result, tuple) else (result,):
                self._known[id(rows)] = (rows, "rows")
        elif isinstance(result, torch.Tensor) and subject is not None:
            made = _kind(name, subject, kind, args[1:])
            if made is not None:
                self._known[id(result)] = (result, made)
        elif name in ("item", "int") and kind == "count" and isinstance(result, torch.SymInt):
            torch._check(result >= 1)  # type: ignore[no-untyped-call]
        return result

    def _answer(self, found: int, kind: Kind) -> int:
        """`found`, what the condition is told, noted."""
        place = _caller()
        self.met[place] = None
        if bool(found) == (kind == "none"):
            self.skipped.add(place)
        return found


def _kind(name: str, subject: torch.Tensor, kind: Kind | None, rest: Sequence[Any]) -> Kind | None:
    """What the result of calling `name` on `subject`, of this kind, with `rest` tells of rows."""
    if kind == "count" and len(rest) == 1 and type(rest[0]) is int:
        compared = _COMPARED.get((name, rest[0]))
        if compared is not None:
            return compared
    if name == "any" and subject.dtype is torch.bool:
        return None if kind == "none" else "some"
    if name in _COUNTS and kind != "none":
        return None if subject.is_floating_point() or subject.is_complex() else "count"
    if kind is None:
        return None
    if name in ("logical_not", "invert", "bitwise_not"):
        return _OPPOSITE.get(kind)
    return kind if name in _KEPT else None


def _caller() -> Place:
    """The line that asked."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno)
