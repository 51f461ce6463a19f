"""Replaces the lightning attention of transformers by one op that is valid at all lengths.

Its loop over blocks (arXiv 2401.04658) is written in the forward of a module, which cannot be
looked up by name. So classes are recognised by their buffers, submodules and attributes. During an
export, such a class gets a forward that calls `moec::linear_attention`, if it agrees with the
original forward on random rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from moec.capture.intercept.interceptor import Handler
from moec.capture.linear_attention.scans import carry

_BUFFERS = {"slope_rate", "query_decay", "key_decay", "diagonal_decay"}
_PARTS = {"qkv_proj", "norm", "output_gate", "out_proj", "act_fn"}
_NUMBERS = {"block_size", "head_dim", "num_attention_heads"}


def is_lightning(module: torch.nn.Module) -> bool:
    """Whether the module has the buffers, submodules and attributes of lightning attention."""
    return (
        _BUFFERS == {name for name, _ in module.named_buffers(recurse=False)}
        and _PARTS <= {name for name, _ in module.named_children()}
        and all(isinstance(getattr(module, name, None), int) for name in _NUMBERS)
    )


def _spelled(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward with its loop as one op; a call with a cache uses the original."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """hidden_states [B, S, D]; attention_mask [B, S], 1 for tokens that are not padding."""
        if cache is not None:
            return original(
                self, hidden_states, position_embeddings, attention_mask, cache=cache, **kwargs
            )
        rows = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            rows = (rows * attention_mask[:, :, None]).to(rows.dtype)
        heads, width = self.num_attention_heads, self.head_dim
        q, k, v = rows.unflatten(-1, (heads, 3 * width)).split(width, dim=3)
        decay = -self.slope_rate.reshape(heads).expand(*rows.shape[:2], heads)
        y, state = carry(q, k, v, decay)
        y = self.norm(y.flatten(2).to(rows.dtype))
        y = torch.sigmoid(self.output_gate(hidden_states)) * y
        return self.out_proj(y), state.to(rows.dtype)

    return forward


def _agrees(module: Any) -> bool:
    """Whether the original forward equals the one with the op on random input that is longer than
    one block of the recurrence."""
    weight = module.qkv_proj.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, module.block_size + 3, weight.shape[1], generator=generator)
    forward = type(module).forward
    try:
        with torch.no_grad():
            x = x.to(weight.dtype)
            expected, actual = (
                call(module, x, None, None)[0].double() for call in (forward, _spelled(forward))
            )
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    limit = 1e-4 if weight.dtype == torch.float32 else 5e-2
    return bool((actual - expected).abs().max() <= limit * expected.abs().max())


def lightning_handlers(model: torch.nn.Module) -> Iterator[Handler]:
    """The model's lightning attention calls `moec::linear_attention`. A class whose forward
    computes something else stays."""
    modules = {type(module): module for module in model.modules() if is_lightning(module)}
    for kind, module in modules.items():
        if _agrees(module):
            yield Handler(kind, "forward", _spelled(kind.forward))
