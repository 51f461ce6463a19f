"""A graph as a PyTorch module: every op runs by its meaning, with gradients.

The result of passes can be trained this way, and compiled again: `moec.compile` takes the module's
graph and weights without tracing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moec.errors import InputError, UsageError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Graph, Program
from moec.ir.interpret.call_signature import CallSignature
from moec.ir.interpret.evaluate import run_graph
from moec.ir.interpret.outputs import Structure
from moec.ir.text import parse, print_graph
from moec.runtime.call.arguments import bind
from moec.torch_private import children_of

Example = tuple[tuple[Any, ...], Mapping[str, Any]]


class GraphModule(nn.Module):
    """A program with the signature of the module that it was captured from.

    Weights named in `trainable` are parameters, all others buffers, under their names in the graph.
    Results have the `structure` of the source's. Behaviour of the source in training mode (dropout,
    router losses) is not part of a captured graph. `why` is the reason why it is no module of the
    source's class, for the error of `save_pretrained`.
    """

    graph: Graph

    def __init__(
        self,
        program: Program,
        trainable: Mapping[str, bool],
        example: Example,
        structure: Structure,
        why: str = "",
        signature: CallSignature | None = None,
    ) -> None:
        super().__init__()
        if program.graph.states:
            names = ", ".join(state.before.name for state in program.graph.states)
            raise UsageError(
                f"the model keeps state between calls ({names}), which training does not support: "
                "turn its cache off (use_cache=False)"
            )
        self.graph = program.graph
        self.example = example
        self.structure = structure
        self.why = why
        self.signature = signature
        self.registered_names: dict[str, str] = {}
        for value in program.graph.params:
            tensor = program.weights[value.name].detach().clone()
            self.registered_names[value.name] = self._hold(
                value.name, tensor, trainable.get(value.name)
            )

    def _hold(self, name: str, tensor: torch.Tensor, trained: bool | None) -> str:
        """Registers a weight. Returns its name, which differs if another attribute has it."""
        *path, last = name.split(".")
        owner: nn.Module = self
        for depth, part in enumerate(path):
            child = children_of(owner).get(part)
            if child is None and hasattr(owner, part):
                path, last = path[:depth], "_".join(name.split(".")[depth:])
                break
            if child is None:
                child = nn.Module()
                owner.add_module(part, child)
            owner = child
        while hasattr(owner, last):
            last += "_"
        if trained is None:
            owner.register_buffer(last, tensor)
        else:
            owner.register_parameter(last, nn.Parameter(tensor, requires_grad=trained))
        return ".".join((*path, last))

    @property
    def program(self) -> Program:
        """The graph with the current weights. Raises UsageError for weights of another dtype than
        the graph was captured in."""
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        weights = {name: held[key].detach() for name, key in self.registered_names.items()}
        self._check_dtypes(weights)
        return Program(self.graph, weights)

    def inputs(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The graph's inputs from the arguments of a call; flags and None must be those of the
        example. Raises InputError where an input is missing or unknown."""
        names = [value.name for value in self.graph.inputs]
        bound = (self.signature.bind if self.signature else bind)(names, args, kwargs or {})
        for name in names:
            if not isinstance(bound.get(name), torch.Tensor):
                raise InputError(f"input {name} is missing: the model takes {', '.join(names)}")
        for name, value in bound.items():
            if name not in names and isinstance(value, torch.Tensor):
                raise InputError(
                    f"there is no input {name}: the model was captured with {', '.join(names)}"
                )
        return tuple(bound[name] for name in names)

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The graph's outputs for its inputs, in order."""
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        weights = {name: held[key] for name, key in self.registered_names.items()}
        self._check_dtypes(weights)
        return run_graph(self.graph, [*tensors, *(weights[p.name] for p in self.graph.params)])

    def _check_dtypes(self, weights: Mapping[str, torch.Tensor]) -> None:
        for value in self.graph.params:
            if weights[value.name].dtype != TORCH_DTYPES[value.dtype]:
                raise UsageError(
                    f"{value.name} is {weights[value.name].dtype}, and the model was captured in "
                    f"{TORCH_DTYPES[value.dtype]}: convert it before, with transform(dtype=...)"
                )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's forward. Raises InputError as `inputs` does."""
        outputs = self.run(self.inputs(args, kwargs))
        if self.structure.count == len(outputs):
            return self.structure.rebuild(outputs)
        return {v.name: t for v, t in zip(self.graph.outputs, outputs, strict=True)}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises UsageError with the reason why no class can load the module."""
        raise UsageError(
            f"{self.why or 'the module is a graph and of no class of transformers'}: save its "
            "state_dict(), or compile it and save that"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": print_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=parse(state["graph"]))
