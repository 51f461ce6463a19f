"""Tensors that a module writes into (a static key-value cache): the states of its program.

Capturing and comparing do not change them, and always start from the contents that they had when
the module was captured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from moec.ir.graph import Program
from moec.torch_private import update_program


def as_buffers(exported: ExportedProgram) -> ExportedProgram:
    """The program with its lifted tensor constants as buffers, which a model may write into.

    torch.export lifts a tensor that is reached outside the module (through a cache object) as a
    constant, even where it is also a parameter or buffer; such a pair becomes one input again.
    """
    signature = exported.graph_signature
    if not any(spec.kind is InputKind.CONSTANT_TENSOR for spec in signature.input_specs):
        return exported
    module, constants = copy.deepcopy(exported.graph_module), dict(exported.constants)
    graph = module.graph
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    owners: dict[tuple[Any, ...], torch.fx.Node] = {}
    input_specs: list[InputSpec] = []
    for spec, node in zip(signature.input_specs, holders, strict=True):
        name = spec.target
        held = exported.state_dict.get(name, constants.get(name)) if name else None
        if not isinstance(held, torch.Tensor):
            input_specs.append(spec)
            continue
        constant = spec.kind is InputKind.CONSTANT_TENSOR
        key = (held.data_ptr(), held.shape, held.stride(), held.dtype)
        if constant and held.numel() and key in owners:
            node.replace_all_uses_with(owners[key])
            graph.erase_node(node)
            del constants[name]
            continue
        owners.setdefault(key, node)
        input_specs.append(
            replace(spec, kind=InputKind.BUFFER, persistent=False) if constant else spec
        )
    module.recompile()
    updated: ExportedProgram = update_program(
        exported, module, replace(signature, input_specs=input_specs), constants=constants
    )
    return updated


@dataclass(frozen=True)
class States:
    """The tensors that a module writes into (`live`), and their first contents."""

    live: Sequence[torch.Tensor] = ()
    first: Sequence[torch.Tensor] = ()

    @contextmanager
    def from_start(self) -> Iterator[None]:
        """While open, the module starts from its first states; on leaving, its contents return."""
        before = [tensor.clone() for tensor in self.live]
        try:
            self._fill(self.first)
            yield
        finally:
            self._fill(before)

    def _fill(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.live, values, strict=True):
                tensor.copy_(value)


def detached(program: Program) -> tuple[Program, States]:
    """The program with copies of its states, so that running the module no longer changes it."""
    names = [state.before.name for state in program.graph.states]
    live = [program.weights[name] for name in names]
    first: Mapping[str, torch.Tensor] = {
        name: tensor.clone() for name, tensor in zip(names, live, strict=True)
    }
    return Program(program.graph, {**program.weights, **first}), States(live, list(first.values()))
