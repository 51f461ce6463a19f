"""The form of a model that its kernels support and in which its experts are recognised.

A module can often be captured in several ways: traced, traced in another form, or with modules that
were observed in place of their code. The passes run on one form after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moec.capture.behaviour.door import Described, observe
from moec.capture.behaviour.layer.parts import modules_without_block
from moec.capture.behaviour.other_sizes import difference_at_other_sizes, guards_of_graph
from moec.capture.captured import Captured
from moec.capture.source import Source, example_of, traceable
from moec.codegen.lower import supported
from moec.errors import CaptureError
from moec.ir.graph import Stage
from moec.model.bind_inputs import bound
from moec.passes.core.runner import Declined, PassResult
from moec.passes.recognise.forms.stacks.own_rows import FORM as OWN_ROWS
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
    refusals: by the name of a module that was observed, why it is no block.
    """

    captured: Captured
    pass_results: tuple[PassResult, ...]
    earlier: tuple[PassResult, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return _blocks(self.pass_results)

    @property
    def declined(self) -> tuple[Declined, ...]:
        reasons = (d for result in (*self.earlier, *self.pass_results) for d in result.declined)
        observed = (Declined(name, why, "behaviour") for name, why in self.refusals.items())
        return (*dict.fromkeys(reasons), *observed)


def best_form(
    source: Source,
    captured: Captured,
    passes: Passes,
    capture_again: Callable[[Sequence[Described]], Captured],
    exact: Sequence[Any],
    backend: Backend,
) -> ModelForm:
    """The first form whose ops all have kernels, with modules that may hold experts and were not
    recognised observed, if that agrees where sizes of their own code change. `exact` are the passes
    that bind inputs. The form that was captured first where there is no such form: its error is the
    most informative."""
    first = pass_results = passes(captured)
    missed = _modules_missed(source, pass_results, captured, backend)
    described, refusals = observe(example_of(source), missed) if missed else ((), {})
    if described:
        guards = guards_of_graph(captured.program.graph)
        again = bound(capture_again(described), exact)
        if why := difference_at_other_sizes(again, guards):
            refusals = {**refusals, **dict.fromkeys((item.name for item in described), why)}
        else:
            captured, pass_results = again, passes(again)
    captured, pass_results = _in_supported_form(captured, pass_results, passes, exact, backend)
    # A form without blocks has uninformative reasons; those for the original code come first.
    earlier = () if pass_results is first or _blocks(pass_results) else first
    return ModelForm(captured, pass_results, earlier, refusals)


def _in_supported_form(
    captured: Captured,
    pass_results: tuple[PassResult, ...],
    passes: Passes,
    exact: Sequence[Any],
    backend: Backend,
) -> tuple[Captured, tuple[PassResult, ...]]:
    """The first form of the capture whose ops all have kernels after its passes, with the results
    of the passes. Returns the arguments if there is none: their error is the most informative."""
    form, after = captured, pass_results
    while not supported(after[-1].program.graph, backend):
        if form.other is None:
            return captured, pass_results
        try:
            form = bound(form.other(), exact)
        except CaptureError:
            return captured, pass_results
        after = passes(form)
    return form, after


def _modules_missed(
    source: Source, pass_results: Sequence[PassResult], captured: Captured, backend: Backend
) -> list[str]:
    """Names of modules that may hold experts and were not recognised, described ones excepted.

    If a rule declined a candidate, or nothing was recognised, these are all modules without a
    block; if the graph cannot be compiled, all modules. A block that lacks its routing does not
    count.
    """
    if not traceable(source):
        return []
    looked = any(
        d.rule == "recognise-experts" for pass_result in pass_results for d in pass_result.declined
    )
    recognised = [block.name for block in _blocks(pass_results) if block.form != OWN_ROWS]
    if not supported(pass_results[-1].program.graph, backend):
        recognised = []
    elif recognised and not looked:
        return []
    assert isinstance(source.model, torch.nn.Module)
    names = modules_without_block(source.model, recognised)
    return [name for name in names if name not in captured.described]


def _blocks(pass_results: Sequence[PassResult]) -> tuple[Block, ...]:
    """The blocks of the last graph in which experts still have bodies."""
    last = [result for result in pass_results if result.stage in (Stage.ATEN, Stage.MOE)][-1]
    return blocks(last.program.graph)
