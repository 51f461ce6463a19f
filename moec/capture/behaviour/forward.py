"""A replacement forward that a user wrote, checked beside the module's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.arguments import Arguments, Recorded
from moec.capture.behaviour.probe import Probe, affordable_length
from moec.capture.behaviour.proof import Proof, prove_forward

Forward = Callable[..., Any]
"""Called as the module's own forward is, the module first."""


def proved_forward(
    module: nn.Module, arguments: Arguments, call: Recorded, forward: Forward
) -> tuple[Proof, Callable[..., Any]]:
    """Raises NoMatch with the first input on which the two differ."""

    def bound(*args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    def run(*tensors: torch.Tensor) -> Any:
        args, kwargs = arguments.build(*tensors)
        return bound(*args, **kwargs)

    probe = Probe(module, arguments)
    probe.longest = affordable_length(probe)
    return prove_forward(probe, run), bound
