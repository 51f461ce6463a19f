"""Runs of a module with chosen logits."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.description import Description
from moec.capture.behaviour.layer.parts import tensor
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


@dataclass
class Run:
    """One run: the leaves of the result by name, and its hidden rows [T, D]."""

    leaves: list[tuple[str, Any]]
    hidden: torch.Tensor


@dataclass
class Probe:
    """The module, its arguments, its description, and the weight of its router."""

    module: nn.Module
    arguments: Arguments
    description: Description = field(default_factory=Description)
    weight_name: str = ""
    columns: int = 0
    longest: int = LONGEST
    farthest: int = LONGEST

    @property
    def width(self) -> int:
        return self.arguments.shape[-1]

    def tokens(self, batch: int, length: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
        """Random tokens [B, S, D] or [B * S, D]."""
        generator = torch.Generator().manual_seed(seed + 1000 * batch + length)
        flat = len(self.arguments.shape) == 2
        size = (batch * length,) if flat else (batch, length)
        return torch.randn(*size, self.width, generator=generator) * scale

    def run(self, tokens: torch.Tensor, logits: torch.Tensor | None = None) -> Run:
        """Run the module, with the router's logits replaced by `logits` if given. Raises NoMatch
        where the module fails on inputs of this size, or where no output has the size of the
        tokens."""
        args, kwargs = self.arguments.build(tokens.clone())
        rows = math.prod(tokens.shape[:-1])
        with torch.no_grad(), nullcontext() if logits is None else self.steered(logits, rows):
            try:
                results = self.module(*args, **kwargs)
            except NoMatch:
                raise
            except Exception as error:  # of the user's code, whatever its kind
                size = " x ".join(map(str, tokens.shape[:-1]))
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise NoMatch(f"it does not run on {size} random tokens: {first}") from error
            leaves = result_leaves(results)
        return Run(leaves, self._hidden(leaves, tokens))

    def steered(self, logits: torch.Tensor, rows: float = math.inf) -> Steer:
        """A context in which the router's logits are `logits`, also for a replacement. The run has
        as many operations as `rows` tokens may need."""
        weight = tensor(self.module, self.weight_name)
        return Steer(weight, self.columns, logits, _MOST_CALLS * (_FEW_ROWS + rows))

    def _hidden(self, leaves: list[tuple[str, Any]], x: torch.Tensor) -> torch.Tensor:
        for _, value in leaves:
            if isinstance(value, torch.Tensor) and value.dim():
                if (value.numel(), value.shape[-1]) == (x.numel(), self.width):
                    return value.reshape(-1, self.width)
        raise NoMatch("no output has the size of its tokens")


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
