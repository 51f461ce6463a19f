"""Proves a replacement forward that a user wrote against the module's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.parts import in_float32
from moec.capture.behaviour.proof.probe import Probe, affordable_lengths
from moec.capture.behaviour.proof.proof import Proof, prove_forward
from moec.errors import NoMatch
from moec.torch_private import pytree

Forward = Callable[..., Any]
"""Called with the module, then with the arguments of the module's own forward."""


def proved_forward(
    module: nn.Module, arguments: Arguments, forward: Forward
) -> tuple[Proof, Callable[..., Any]]:
    """The proof and the forward bound to `module`. Raises NoMatch, with the first input on which
    the two forwards differ."""

    probe = Probe(in_float32(module), arguments)
    probe.longest, probe.farthest = affordable_lengths(probe)

    def run(tokens: torch.Tensor) -> Any:
        args, kwargs = arguments.build(tokens)
        return forward(probe.module, *args, **kwargs)

    proof = prove_forward(probe, run)

    def proved(*args: Any, **kwargs: Any) -> Any:
        require_rows(pytree.tree_leaves((args, kwargs))[arguments.position], proof)
        return forward(module, *args, **kwargs)

    return proof, proved


def require_rows(tokens: torch.Tensor, proof: Proof) -> None:
    """Raise NoMatch where there are more tokens [.., D] than a description was proved for. In an
    export this becomes a guard, which bounds the sizes of the graph."""
    count = math.prod(tokens.shape[:-1])
    if count > proof.farthest:
        raise NoMatch(f"it was compared with eager for at most {proof.farthest} tokens")
