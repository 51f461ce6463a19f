"""`moec.prepare(model)`: changes a model so that the backend receives complete MoE layers.

The experts modules of transformers loop over the experts that their router chose, or call a grouped
product. After preparation, each experts module is one call of `moec::experts`, which the backend
recognises, and which PyTorch can run and differentiate without a compiler.

Other models find the tokens of each expert with `torch.where`. Dynamo captures that only under a
setting, and otherwise skips the whole module before it calls any backend. After preparation, the
model's forward enables the setting for the code that it runs.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import torch

from moec.capture.export.huggingface import switch_experts
from moec.dynamo.captured_layers import capture_layers
from moec.dynamo.compiler import backend
from moec.dynamo.layer_graph import previous_forward, replace_forward, restore_forward
from moec.dynamo.record import RECORDER, Fallback
from moec.dynamo.skipped import watch
from moec.errors import UsageError
from moec.torch_private import GuardOnDataDependentSymNode, dynamo_config

Model = TypeVar("Model", bound=torch.nn.Module)


def prepare(model: Model, *args: Any, **kwargs: Any) -> Model:
    """Prepare the model in place and return it. Its results do not change.

    `args` and `kwargs` are those of a call. With them, modules whose loop over experts Dynamo
    cannot capture are captured by moec, and compute the same by other operators, up to rounding; a
    FallbackWarning names those that moec does not capture either.

    Raises UsageError for anything but a module, CaptureError where an expert cannot be traced.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a {type(model).__name__} is not a torch module: prepare the model")
    watch(backend)
    switched = switch_experts(model)
    if args or kwargs:
        for part in model.modules():
            restore_forward(part, _NAME, _PREPARED)
        RECORDER.fall_back(capture_layers(model, args, kwargs), strict=False)
    if not switched:
        replace_forward(model, _NAME, _PREPARED)
    return model


def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not self.__dict__.get(_UNCAPTURED):
        try:
            with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
                return previous_forward(self, _NAME, *args, **kwargs)
        except GuardOnDataDependentSymNode as error:
            where = type(self).__name__
            RECORDER.fall_back([Fallback(where, _on_data(error))], strict=False)
            self.__dict__[_UNCAPTURED] = True
    return previous_forward(self, _NAME, *args, **kwargs)


_NAME = "prepared"
_UNCAPTURED = "moec_uncaptured"
"""Set on a module where Dynamo fails under the setting: without it, it skips the function."""


def _on_data(error: GuardOnDataDependentSymNode) -> str:
    line = re.search(r"Caused by: *(.+?) *# *(\S+)", str(error))
    code = f" `{line[1].strip(' ()')}` ({line[2]})" if line else ""
    return (
        f"Dynamo cannot capture a branch on the number of an expert's tokens{code}: prepare it "
        "with the arguments of a call, moec.prepare(model, x), or remove the branch"
    )


_disable: Any = torch.compiler.disable  # it has no types
_PREPARED = _disable(forward, recursive=False)  # Dynamo does not capture it, but what it calls
