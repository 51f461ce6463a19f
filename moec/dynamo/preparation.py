"""`moec.prepare(model)`: a Hugging Face model whose MoE layers reach the backend whole.

The experts of transformers loop over what their router chose, or call a grouped product of
their own. Prepared, each experts module is one call of `moec::experts`, which the backend
recognises, and which PyTorch runs and differentiates where nothing compiles it.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from moec.capture.huggingface import switch_experts
from moec.errors import UsageError

Model = TypeVar("Model", bound=torch.nn.Module)


def prepare(model: Model) -> Model:
    """The same model, changed in place; models that are not of Hugging Face stay as they are.

    Raises UsageError for what is no module, CaptureError where an expert cannot be traced.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a {type(model).__name__} is not a torch module: prepare the model")
    switch_experts(model)
    return model
