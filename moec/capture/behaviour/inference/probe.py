"""Experiments on a module: runs with chosen logits, records of submodules, solved weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.description import Description, Path
from moec.capture.behaviour.layer.parts import tensor, walk
from moec.capture.behaviour.layer.steering import Steer
from moec.errors import NoMatch

_AFFORDABLE = ((0.015, 4097), (0.05, 1025))
"""(CPU seconds that 256 tokens take, longest run that is then made). The runs of a proof have about
as many tokens as twenty of the longest, so a loop over tokens is proved within about 15 s."""
LONGEST = 4097
"""The most rows of one expert that are tried; a greater capacity is not noticed."""
_FARTHEST = (1 << 10, 1 << 15)
"""The most tokens of the one run that bounds the tokens of a description: at least, for a slow
module, and at most."""
_FAR_SECONDS = 2.0
_MOST_CALLS = 500
"""How many operations a run may have for each token, `_FEW_ROWS` more counted, before it is taken
not to end. A loop over the tokens and experts of a layer has a few hundred."""
_FEW_ROWS = 100


@dataclass(frozen=True)
class SubmoduleCall:
    name: str
    read: torch.Tensor  # [n, d]
    result: torch.Tensor
    alone: bool  # it read nothing else


@dataclass
class Run:
    """One run: the leaves of the result by name, its hidden rows [T, D], and the logits that the
    router itself computed."""

    leaves: list[tuple[str, Any]]
    hidden: torch.Tensor
    logits: torch.Tensor | None


@dataclass
class Probe:
    """The module, its arguments, its router's weight, and what has been found out so far."""

    module: nn.Module
    arguments: Arguments
    description: Description = field(default_factory=Description)
    weight_name: str = ""
    columns: int = 0
    longest: int = LONGEST
    farthest: int = LONGEST
    nodes: dict[Path, torch.Tensor] = field(default_factory=dict)
    """Results [T, d] of chains of submodules on the tokens of the last run that `watch` made."""

    @property
    def width(self) -> int:
        return self.arguments.shape[-1]

    def tokens(self, batch: int, length: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
        """Random tokens [B, S, D] or [B * S, D]."""
        generator = torch.Generator().manual_seed(seed + 1000 * batch + length)
        flat = len(self.arguments.shape) == 2
        size = (batch * length,) if flat else (batch, length)
        return torch.randn(*size, self.width, generator=generator) * scale

    def run(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor | None = None,
        observed: bool = True,
    ) -> Run:
        """Run the module, with the router's logits replaced by `logits` if given. A run that is not
        `observed` has no logits, and takes a third less in a loop over tokens. Raises NoMatch where
        the module fails on inputs of this size, or where no output has the size of the tokens."""
        args, kwargs = self.arguments.build(tokens.clone())
        steer = self.steered(logits, math.prod(tokens.shape[:-1]))
        with torch.no_grad(), steer if observed or logits is not None else nullcontext():
            try:
                results = self.module(*args, **kwargs)
            except NoMatch:
                raise
            except Exception as error:  # of the user's code, whatever its kind
                size = " x ".join(map(str, tokens.shape[:-1]))
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise NoMatch(f"it does not run on {size} random tokens: {first}") from error
            leaves = result_leaves(results)
        return Run(leaves, self._hidden(leaves, tokens), steer.observed)

    def steered(self, logits: torch.Tensor | None, rows: float = math.inf) -> Steer:
        """A context in which the router's logits are `logits`, also for a replacement. The run has
        as many operations as `rows` tokens may need."""
        weight = tensor(self.module, self.weight_name) if self.weight_name else None
        return Steer(weight, self.columns, logits, _MOST_CALLS * (_FEW_ROWS + rows))

    def _hidden(self, leaves: list[tuple[str, Any]], x: torch.Tensor) -> torch.Tensor:
        for _, value in leaves:
            if isinstance(value, torch.Tensor) and value.dim():
                if (value.numel(), value.shape[-1]) == (x.numel(), self.width):
                    return value.reshape(-1, self.width)
        raise NoMatch("no output has the size of its tokens")

    def watch(
        self, tokens: torch.Tensor, logits: torch.Tensor | None = None
    ) -> list[SubmoduleCall]:
        """The calls of submodules in one run. Sets `nodes` to the results of their chains."""
        calls: list[SubmoduleCall] = []

        def hook(name: str) -> Callable[..., None]:
            def record(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
                tensors = [t for t in (*args[:1], result) if isinstance(t, torch.Tensor)]
                if len(tensors) == 2 and all(t.dim() for t in tensors):
                    read, result = (t.reshape(-1, t.shape[-1]).clone() for t in tensors)
                    calls.append(SubmoduleCall(name, read, result, len(args) == 1 and not kwargs))

            return record

        handles = [
            part.register_forward_hook(hook(name), with_kwargs=True)
            for name, part in self.module.named_modules()
            if name
        ]
        try:
            self.run(tokens, logits)
        finally:
            for handle in handles:
                handle.remove()
        self.nodes = self._chains(calls, tokens.reshape(-1, self.width))
        return calls

    def _chains(
        self, calls: Sequence[SubmoduleCall], flat: torch.Tensor
    ) -> dict[Path, torch.Tensor]:
        """The results of calls that read only the tokens or another such result, by the shortest
        path of names; submodules inside experts are left out."""
        nodes: dict[Path, torch.Tensor] = {(): flat}
        inside = tuple(f"{name}." for name in self.description.experts)
        for call in calls:
            if f"{call.name}.".startswith(inside):
                continue
            start = next(
                (p for p, v in nodes.items() if call.alone and torch.equal(call.read, v)), None
            )
            if start is None:
                continue
            path = (*start, call.name)
            old = next((p for p, v in nodes.items() if torch.equal(v, call.result)), None)
            if old and len("".join(old)) > len("".join(path)):
                del nodes[old]  # it only names the last part of this path
                old = None
            if old is None:
                nodes[path] = call.result
        return nodes

    def wide_paths(self) -> list[Path]:
        """Chains whose results are as wide as the tokens."""
        return [path for path, value in self.nodes.items() if value.shape[-1] == self.width]

    def solve(self, tokens: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(weights, remainder): the least-squares weights [T, N] by which the output is a sum of
        all experts' results, then of the results of `wide_paths`; and the greatest relative
        remainder of a row.

        Raises NoMatch where there are more parts than the width, so that weights are not unique.
        """
        flat, hidden = tokens.reshape(-1, self.width), self.run(tokens, logits).hidden
        with torch.no_grad():
            rows = walk(self.module, self.description.source, flat)
            results = [self.module.get_submodule(name)(rows) for name in self.description.experts]
            wide = [walk(self.module, path, flat) for path in self.wide_paths()]
        columns = torch.stack([*results, *wide], 1).double().mT
        target = hidden.double()[..., None]
        if columns.shape[2] > columns.shape[1]:
            raise NoMatch(
                f"{columns.shape[2]} parts cannot be told apart in a width of {columns.shape[1]}"
            )
        weights = torch.linalg.lstsq(columns, target).solution
        size = target.norm(dim=(1, 2))
        remainder = (columns @ weights - target).norm(dim=(1, 2))
        share = float((remainder / (size + 1e-3 * size.max() + 1e-30)).max())
        return weights[..., 0].float(), share


def affordable_lengths(probe: Probe) -> tuple[int, int]:
    """The length of the longest runs: `LONGEST`, or less for a slow module; and that of the run
    that bounds the tokens of a description. The proof states both."""
    tokens = probe.tokens(1, 256)
    probe.run(tokens)
    start = time.thread_time()  # other processes on this machine do not count
    probe.run(tokens)
    seconds = time.thread_time() - start
    longest = next((n for limit, n in _AFFORDABLE if seconds < limit), 257)
    least, most = _FARTHEST
    affordable = int(256 * _FAR_SECONDS / max(seconds, 1e-4))
    return longest, max(least, longest, min(most, 1 << affordable.bit_length() - 1))


def result_leaves(result: Any, name: str = "output") -> list[tuple[str, Any]]:
    """(name, value) of every leaf of a result: tensors, numbers, None."""
    items: list[tuple[object, Any]]
    if isinstance(result, tuple | list):
        items = list(enumerate(result))
    elif isinstance(result, dict):
        items = list(result.items())
    elif is_dataclass(result) and not isinstance(result, type):
        items = [(f.name, getattr(result, f.name)) for f in fields(result)]
    else:
        return [(name, result)]
    return [leaf for key, value in items for leaf in result_leaves(value, f"{name}.{key}")]
