"""Answers branches on data while a module is traced, and records the answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch

from moec.capture.user_code.sites import Foreign, Site, site_of
from moec.errors import CaptureError
from moec.torch_private import ShapeEnv, free_unbacked_symbols

_HERE = str(Path(__file__).parent)
_MANY = 10**6
_MOST_TURNS = 32
"""How often the condition of one `while` loop may be asked during a trace."""
_MACHINERY = ("sym_node.py", "symbolic_shapes.py", "recording.py", "_traceback.py")


@dataclass(frozen=True)
class Question:
    """A condition on data that was answered at `site`: a comparison, or a tensor's truth value."""

    site: Site
    condition: Any = None
    tensor: torch.Tensor | None = None


@dataclass
class Branches:
    """Answers conditions on data during one trace.

    `answers` are prescribed by the search, by branch; any other branch is answered as it comes out
    when all counts are large and distinct. `met` are the answers that this trace used, and
    `questions` all conditions that it evaluated, in order. `positive` are the numbers read from
    data that are positive wherever there are rows, such as how many an expert has that every token
    chooses.
    """

    foreign: Foreign
    answers: Mapping[Site, bool] = field(default_factory=dict)
    met: dict[Site, bool] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    positive: set[Any] = field(default_factory=set)

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
        if not self.positive.isdisjoint(free):
            numbers = {u: sympy.Dummy(u.name, integer=True, positive=True) for u in self.positive}
            answer = condition.subs(numbers)
            if answer in (sympy.true, sympy.false):
                return bool(answer)
        frame = _who_asks(sys._getframe(1), self.foreign)
        if frame is None:
            # torch itself evaluates the condition, for a purpose to which the exact size does not
            # matter
            return usual
        return self._answer(Question(site_of(frame), condition), usual)

    def ask(self, tensor: torch.Tensor, usual: bool) -> bool:
        """The answer to the truth value of a tensor."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _ours(frame):
            frame = frame.f_back
        while frame is not None and frame.f_code.co_filename.endswith("torch/_tensor.py"):
            frame = frame.f_back
        if frame is None or self.foreign.holds(frame):
            return usual
        return self._answer(Question(site_of(frame), tensor=tensor), usual)

    def _answer(self, question: Question, usual: bool) -> bool:
        """Raises CaptureError where data decide how often a `while` loop runs: the answer never
        changes, and the trace would not end."""
        if question.site.repeats:
            turns = sum(earlier.site == question.site for earlier in self.questions)
            if turns >= _MOST_TURNS:
                raise CaptureError(
                    "how often this loop runs depends on data, and a graph has a fixed number of "
                    "turns: write `for turn in range(N)` with enough turns"
                )
        self.met[question.site] = self.answers.get(question.site, usual)
        self.questions.append(question)
        return self.met[question.site]


def _ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_HERE)


def _who_asks(frame: FrameType | None, foreign: Foreign) -> FrameType | None:
    """The user's frame that converted a number to bool; None where torch itself evaluated it.

    Python converts by `__bool__`, a Python function of torch. Where no such frame is between the
    symbolic machinery and the user's frame, the evaluation came from C++.
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
    """Whether an expression is a condition. For sympy, symbols are too; here they are numbers."""
    boolean = isinstance(expression, sympy.logic.boolalg.Boolean)
    return boolean and not isinstance(expression, sympy.Expr)
