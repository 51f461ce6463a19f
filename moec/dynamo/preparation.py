"""`moec.prepare(model)`: changes a model so that the backend receives complete MoE layers.

The experts modules of transformers loop over the experts that their router chose, or call a grouped
product. After preparation, each experts module is one call of `moec::experts`, which the backend
recognises, and which PyTorch can run and differentiate without a compiler.

Other models find the tokens of each expert with `torch.where`. Dynamo captures that only under a
setting, and otherwise skips the whole module before it calls any backend. After preparation, the
model's forward enables the setting for the code that it runs.
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
    """Prepare the model in place and return it. Its results do not change.

    Raises UsageError for anything but a module, CaptureError where an expert cannot be traced.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a {type(model).__name__} is not a torch module: prepare the model")
    watch(backend)
    if not switch_experts(model):
        # a copy of the model then binds it to the copy
        model.forward = MethodType(_PREPARED, model)
    return model


def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return type(self).forward(self, *args, **kwargs)


_disable: Any = torch._dynamo.disable  # it has no types
_PREPARED = _disable(forward, recursive=False)  # Dynamo does not capture it, but what it calls
