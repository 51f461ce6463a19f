"""The form of a model that its kernels support and in which its experts are recognised.

A module can often be captured in several ways: traced, or speculated with rows by expert, in pieces
or masked. The passes run on one form after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.capture.captured import Captured
from moec.codegen.lower import supported
from moec.errors import CaptureError
from moec.ir.graph import Stage
from moec.model.bind_inputs import bound
from moec.passes.core.runner import Declined, PassResult
from moec.report.blocks import blocks
from moec.report.data import Block

if TYPE_CHECKING:
    from moec.codegen.backend import Backend

Passes = Callable[[Captured], tuple[PassResult, ...]]
"""Runs the passes of a compilation on a capture."""


@dataclass(frozen=True)
class ModelForm:
    """One form of a model, after its passes.

    earlier: results for the form that was captured first, whose reasons are more informative.
    """

    captured: Captured
    pass_results: tuple[PassResult, ...]
    earlier: tuple[PassResult, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        return _blocks(self.pass_results)

    @property
    def declined(self) -> tuple[Declined, ...]:
        reasons = (d for result in (*self.earlier, *self.pass_results) for d in result.declined)
        return tuple(dict.fromkeys(reasons))


def best_form(
    captured: Captured, passes: Passes, exact: Sequence[Any], backend: Backend
) -> ModelForm:
    """The first form of the capture whose ops all have kernels after its passes. `exact` are the
    passes that bind inputs. The form that was captured first where there is no such form: its error
    is the most informative."""
    form, first = captured, passes(captured)
    after = first
    while not supported(after[-1].program.graph, backend):
        if form.other is None:
            return ModelForm(captured, first)
        try:
            form = bound(form.other(), exact)
        except CaptureError:
            return ModelForm(captured, first)
        after = passes(form)
    # A form without blocks has uninformative reasons; those for the original code come first.
    earlier = () if after is first or _blocks(after) else first
    return ModelForm(form, after, earlier)


def _blocks(pass_results: Sequence[PassResult]) -> tuple[Block, ...]:
    """The blocks of the last graph in which experts still have bodies."""
    last = [result for result in pass_results if result.stage in (Stage.ATEN, Stage.MOE)][-1]
    return blocks(last.program.graph)
