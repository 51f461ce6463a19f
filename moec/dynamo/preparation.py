"""`moec.prepare(model)`: a model whose MoE layers reach the backend whole.

The experts of transformers loop over what their router chose, or call a grouped product of
their own. Prepared, each experts module is one call of `moec::experts`, which the backend
recognises, and which PyTorch runs and differentiates where nothing compiles it.

Other models may ask `torch.where` for the tokens of each expert. Dynamo captures that under a
setting alone, and skips the whole module without it, before any backend is called. Prepared, the
model's forward opens the setting, for what runs inside it and for nothing else.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

import torch

from moec.capture.huggingface import switch_experts
from moec.dynamo.compiler import backend
from moec.dynamo.skipped import watch
from moec.errors import UsageError

Model = TypeVar("Model", bound=torch.nn.Module)


def prepare(model: Model) -> Model:
    """The same model, changed in place. Its results stay as they are.

    Raises UsageError for what is no module, CaptureError where an expert cannot be traced.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a {type(model).__name__} is not a torch module: prepare the model")
    watch(backend)
    if not switch_experts(model):
        model.forward = MethodType(_PREPARED, model)  # a copy of the model binds it to itself
    return model


def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return type(self).forward(self, *args, **kwargs)


_disable: Any = torch._dynamo.disable  # it has no types
_PREPARED = _disable(forward, recursive=False)  # not captured: what it calls is
