"""nn.linear_attention: attention without a softmax, as a recurrent state.

The state of a head is a matrix S[Dk, Dv]. At each position it decays, is updated by the key and the
value, and is read by the query:

    S = exp(decay) * S
    S = S + outer(k, v)                        a sum (Mamba 2, arXiv 2405.21060; lightning
                                               attention, arXiv 2401.04658)
    S = S + outer(k, beta * (v - k @ S))       the delta rule (arXiv 2412.06464)
    y = q @ S

B batch, S positions, G key heads, H value heads (H is a multiple of G: value head h reads key
head h // (H/G)), Dk features of queries and keys, Dv of values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import Runner, defop, inputs_of, require, tensors_of
from moec.ir.ops.dense.attention import divides


@dataclass(frozen=True)
class LinearAttention:
    """The inputs of nn.linear_attention by name.

    q, k [B, S, G, Dk]; v [B, S, H, Dv]; decay, of logarithms: [B, S, H] one per head, or
    [B, S, H, Dk] one per feature of the key, or [B, S, H, Dv] with rates [H, Dk, Dv]: the decay
    of S[i, j] is then decay[j] * rates[i, j] (Mamba, arXiv 2312.00752). beta [B, S, H] makes it
    the delta rule. start [B, H, Dk, Dv] is the state before the first position: zeros if None.
    """

    q: Value
    k: Value
    v: Value
    decay: Value
    rates: Value | None
    beta: Value | None
    start: Value | None

    @staticmethod
    def of(op: Op) -> LinearAttention:
        """Raises IRError where inputs and attributes do not go together."""
        return LinearAttention(**inputs_of(op))

    @property
    def per(self) -> Literal["head", "key", "rate"]:
        """The granularity of the decay: per head, per feature of the key, or with rates."""
        if self.rates is not None:
            return "rate"
        return "head" if len(self.decay.shape) == 3 else "key"


def _infer(op: Op) -> tuple[TensorType, ...]:
    a = LinearAttention.of(op)
    for value in op.inputs:
        require(op, value.dtype == "f32", f"{value} is not f32")
    for name, value in (("q", a.q), ("k", a.k), ("v", a.v)):
        require(op, len(value.shape) == 4, f"{name} is {value.type}, expected four axes")
    batch, length, shared, width = a.k.shape
    heads, features = a.v.shape[2:]
    require(op, a.q.shape == a.k.shape, f"q is {a.q.type}, k is {a.k.type}")
    require(op, a.v.shape[:2] == (batch, length), f"k is {a.k.type}, v is {a.v.type}")
    require(op, divides(shared, heads), f"{heads} value heads share {shared} key heads")
    state = (heads, width, features)
    each = {"head": (), "key": (width,), "rate": (features,)}[a.per]
    expected = {
        "decay": (a.decay, (batch, length, heads, *each)),
        "rates": (a.rates, state),
        "beta": (a.beta, (batch, length, heads)),
        "start": (a.start, (batch, *state)),
    }
    for name, (operand, shape) in expected.items():
        fits = operand is None or operand.shape == shape
        require(
            op, fits, f"{name} is {operand and operand.type}, expected {TensorType('f32', shape)}"
        )
    return (a.v.type, TensorType("f32", (batch, *state)))


@defop("nn.linear_attention", _infer, "q, k, v, decay, rates?rated, beta?delta, start?started")
def linear_attention(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """Inputs as in `LinearAttention` -> y[B, S, H, Dv], the last state[B, H, Dk, Dv].

    Attributes: `rated`, `delta`, `started` are set where rates, beta and start exist, in this
    order. All tensors are float32.
    """
    return recurrence(**tensors_of("nn.linear_attention", op, tensors, attrs))


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    rates: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning of nn.linear_attention, position by position. Shapes as in `LinearAttention`."""
    repeats = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    if start is not None:
        state = start.clone()
    y = torch.empty_like(v)
    rows = decay if decay.ndim == 4 else decay[..., None]
    for t in range(v.shape[1]):
        logarithm = rows[:, t, :, :, None] if rates is None else rows[:, t, :, None] * rates
        state = state * logarithm.exp()
        key, new = k[:, t, :, :, None], v[:, t, :, None]
        if beta is not None:
            new = (new - (key * state).sum(2, keepdim=True)) * beta[:, t, :, None, None]
        state = state + key * new
        y[:, t] = (q[:, t, :, None] @ state)[:, :, 0]
    return y, state
