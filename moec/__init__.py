"""moec: the compiler for mixture-of-experts models.

    model = moec.compile(module, (inputs,))
    model(inputs); model.report(); model.save("model.moec"); moec.load("model.moec")

Names are imported when they are first used: `moec run` needs neither torch nor TVM's compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec import train
    from moec.api import compile
    from moec.compiled import CompiledModel
    from moec.dynamo import prepare, stats
    from moec.errors import MoecError
    from moec.loading import LoadedModel, load
    from moec.transformation import transform

__all__ = [
    "CompiledModel",
    "LoadedModel",
    "MoecError",
    "compile",
    "load",
    "prepare",
    "stats",
    "train",
    "transform",
]

_WHERE = {
    "CompiledModel": "moec.compiled",
    "LoadedModel": "moec.loading",
    "MoecError": "moec.errors",
    "compile": "moec.api",
    "load": "moec.loading",
    "prepare": "moec.dynamo",
    "stats": "moec.dynamo",
    "transform": "moec.transformation",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("moec.train")
    if name not in _WHERE:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
