"""Shared by the tests of the systems: an example as a module, and the record of a compilation."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from docs.systems import ROOT, Figure, Record, Source
from moec import CompiledModel
from moec.report.data import Block

Keep = Callable[[Record], None]
"""What the fixture `keep` gives: it compares a record with the golden one."""


def load(name: str) -> ModuleType:
    """examples/systems/`name`.py, whose name Python's import cannot write."""
    module_name = f"systems_{name}"
    if module_name not in sys.modules:
        path = ROOT / "examples" / "systems" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return sys.modules[module_name]


def describe(block: Block) -> str:
    parts = [f"{block.experts} {block.activation} experts, {block.router}", f"form: {block.form}"]
    parts += [f"and {block.zero}"] if block.zero else []
    parts += [f"shared expert: {block.shared}"] if block.shared else []
    return "; ".join(parts)


def record_of(
    compiled: CompiledModel,
    source: Source,
    agreement: str,
    figures: Sequence[Figure] = (),
    missing: Sequence[str] = (),
    captured: str = "",
) -> Record:
    """The facts of a compilation; `captured` where it is not traced, speculated or described."""
    way = "described" if compiled.captured.described else compiled.captured.way
    report = compiled.report()
    changed = [line.name for line in report.passes if line.rewrites]
    return Record(
        source,
        captured or way,
        tuple(map(describe, compiled.blocks)),
        tuple(dict.fromkeys(changed)),
        agreement,
        report.parameters,
        report.active_parameters,
        sum(report.bytes_by_dtype.values()),
        tuple(figures),
        tuple(missing),
    )
