"""Proves a replacement forward that a user wrote against the module's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.inference.probe import Probe, affordable_length
from moec.capture.behaviour.layer.arguments import Arguments, RecordedCall
from moec.capture.behaviour.layer.parts import in_float32
from moec.capture.behaviour.proof.proof import Proof, prove_forward

Forward = Callable[..., Any]
"""Called with the module, then with the arguments of the module's own forward."""


def proved_forward(
    module: nn.Module, arguments: Arguments, call: RecordedCall, forward: Forward
) -> tuple[Proof, Callable[..., Any]]:
    """The proof and the forward bound to `module`. Raises NoMatch, with the first input on which
    the two forwards differ."""

    probe = Probe(in_float32(module), arguments)
    probe.longest = affordable_length(probe)

    def run(*tensors: torch.Tensor) -> Any:
        args, kwargs = arguments.build(*tensors)
        return forward(probe.module, *args, **kwargs)

    return prove_forward(probe, run), partial(forward, module)
