"""The backend of `torch.compile(model, backend="moec")`.

torch finds it by its entry point. From a checkout that is not installed, importing this package
registers it.
"""

from __future__ import annotations

from torch.compiler import list_backends

from moec.cache import set_inductor_folder
from moec.dynamo.compiler import backend
from moec.dynamo.preparation import prepare
from moec.dynamo.record import Fallback, FallbackError, FallbackWarning, Stats, stats
from moec.dynamo.skipped import watch
from moec.torch_private import register_backend

__all__ = [
    "Fallback",
    "FallbackError",
    "FallbackWarning",
    "Stats",
    "backend",
    "prepare",
    "stats",
]

if "moec" not in list_backends(exclude_tags=()):
    register_backend(backend, name="moec")

watch(backend)
set_inductor_folder()
