"""Branches on data: how they are answered while a module is traced, and which those were."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from moec.capture.speculate.sites import Foreign, Site, site_of

_HERE = str(Path(__file__).parent)
_MANY = 10**6
_MACHINERY = ("sym_node.py", "symbolic_shapes.py", "recording.py", "_traceback.py")


@dataclass(frozen=True)
class Question:
    """A condition on data that was answered at `site`: a comparison of numbers, or a tensor that
    was made a bool."""

    site: Site
    condition: Any = None
    tensor: torch.Tensor | None = None


@dataclass
class Branches:
    """`answers` are those of the search, by branch; any other branch is answered as it comes out
    with many rows, no two numbers of them alike. `met` are the answers of this trace, and
    `questions` all that was asked there, in order."""

    foreign: Foreign
    answers: Mapping[Site, bool] = field(default_factory=dict)
    met: dict[Site, bool] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)

    def decide(self, env: ShapeEnv, condition: Any) -> bool:
        """The answer to a condition over numbers that were read from data."""
        free = sorted(free_unbacked_symbols(condition), key=str)
        many: dict[Any, int] = {u: _MANY + 1009 * (i + 1) for i, u in enumerate(free)}
        hints = {
            s: env.backed_var_to_val[s]
            for s in condition.free_symbols
            if s in env.backed_var_to_val
        }
        usual = bool(condition.subs(many).subs(hints))
        frame = _who_asks(sys._getframe(1), self.foreign)
        if frame is None:
            return usual  # torch asks for itself, of a size that is as good as any
        return self._answer(Question(site_of(frame), condition), usual)

    def ask(self, tensor: torch.Tensor, usual: bool) -> bool:
        """The answer to a bool of a tensor."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _ours(frame):
            frame = frame.f_back
        while frame is not None and frame.f_code.co_filename.endswith("torch/_tensor.py"):
            frame = frame.f_back
        if frame is None or self.foreign.holds(frame):
            return usual
        return self._answer(Question(site_of(frame), tensor=tensor), usual)

    def _answer(self, question: Question, usual: bool) -> bool:
        self.met[question.site] = self.answers.get(question.site, usual)
        self.questions.append(question)
        return self.met[question.site]


def _ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_HERE)


def _who_asks(frame: FrameType | None, foreign: Foreign) -> FrameType | None:
    """The user's frame that made a number a bool; None where torch asks.

    Python asks through `__bool__`, which is a function of torch's. Where there is none between
    the symbolic machinery and the user's frame, C++ asks.
    """
    python = False
    while frame is not None and (
        _ours(frame)
        or frame.f_code.co_filename.endswith(_MACHINERY)
        or frame.f_code.co_filename.endswith("torch/__init__.py")
    ):
        python |= frame.f_code.co_name == "__bool__"
        frame = frame.f_back
    return frame if python and frame is not None and not foreign.holds(frame) else None


def is_condition(expression: Any) -> bool:
    """A symbol is a Boolean for sympy too, and here a number."""
    boolean = isinstance(expression, sympy.logic.boolalg.Boolean)
    return boolean and not isinstance(expression, sympy.Expr)
