"""A model with what is needed to call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.capture.behaviour.recorded import ModelExample
from moec.errors import UsageError
from moec.ir.interpret.graph_module import GraphModule
from moec.ir.sizes.dims import Bounds
from moec.sources.checkpoint.arrange import ArrangedCodes
from moec.sources.memory.memory import InMemory


@dataclass(frozen=True)
class Source:
    """A model with what is needed to call it. `files` are copied into the artifact. `unnamed` is
    True where the caller gave a folder and so named no class; the model's results then have the
    type that the artifact gives them. `notes` are for the report. `codes` reads the weights that
    the model's checkpoint stores in few bits. `memory` is where weights are: those of a large
    checkpoint have values only while `memory.reading()` is open."""

    model: torch.nn.Module | ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    name: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    unnamed: bool = False
    notes: tuple[str, ...] = ()
    codes: Callable[[], ArrangedCodes] | None = None
    memory: InMemory = field(default_factory=InMemory)


def traceable(source: Source) -> bool:
    """Whether the modules of the source are Python code, and not a graph or an export."""
    return isinstance(source.model, torch.nn.Module) and not isinstance(source.model, GraphModule)


def example_of(source: Source) -> ModelExample:
    assert isinstance(source.model, torch.nn.Module)
    return ModelExample(source.model, source.args, source.kwargs)


def module_source(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source:
    """The source of a module. A Hugging Face model is called without a cache unless the caller
    asked for one, since the cache would add dozens of output tensors."""
    name = type(model).__name__
    if isinstance(model, GraphModule) and not args and not kwargs:
        return Source(model, *model.example, name=name)
    if not args and not kwargs and inspect.signature(model.forward).parameters:
        raise UsageError(f"{name} needs example inputs: moec.compile(model, (input, ...))")
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "use_cache", None) and hasattr(model, "set_experts_implementation"):
        kwargs = {"use_cache": False} | kwargs
    return Source(model, args, kwargs, name=name)


def described_error(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
