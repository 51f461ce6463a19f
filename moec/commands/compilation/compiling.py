"""What surrounds a compilation in a command: its progress is shown, its errors are explained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from moec.commands.options.shapes import explain_sizes
from moec.commands.output.progress import Progress, hush
from moec.runtime.process.threads import shorten_spinning

if TYPE_CHECKING:
    from moec.model.compiled import CompiledModel


@contextmanager
def compiling(
    quiet: bool, plan: Mapping[str, float] = MappingProxyType({})
) -> Iterator[tuple[Callable[..., CompiledModel], Progress]]:
    """`moec.compile`, which reports its phases to the progress of the command."""
    shorten_spinning()
    hush()
    with explain_sizes(), Progress(quiet, plan=plan) as progress:
        progress.phase("start")  # imports torch, which takes a moment, and checks options
        from moec import compile as compile_model

        yield partial(compile_model, progress=progress.phase), progress
