"""moec: the compiler for mixture-of-experts models.

    model = moec.compile(module, (inputs,))
    model(inputs); model.report(); model.save("model.moec"); moec.load("model.moec")

Names are imported on first use: `moec run` needs neither torch nor TVM's compiler.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from moec.errors import SetupError
from moec.extras import missing_extra
from moec.runtime.process.backtraces import symbols_read
from moec.runtime.process.gc_pause import gc_deferred
from moec.spelling import did_you_mean

if TYPE_CHECKING:
    from moec.api import compile
    from moec.capture.behaviour.describe import describe
    from moec.dynamo import prepare, stats
    from moec.errors import MoecError
    from moec.inspect.comparison.compare import compare
    from moec.inspect.exploration.explore import explore
    from moec.model.compiled import CompiledModel
    from moec.model.load import LoadedModel, load
    from moec.model.transformation.transform import transform
    from moec.optimise.evaluation.evaluate import evaluate
    from moec.optimise.optimisation.optimize import optimize
    from moec.parallel.build import compile_ranks

__all__ = [
    "CompiledModel",
    "LoadedModel",
    "MoecError",
    "compare",
    "compile",
    "compile_ranks",
    "describe",
    "evaluate",
    "explore",
    "load",
    "optimize",
    "prepare",
    "stats",
    "transform",
]

_WHERE = {
    "CompiledModel": "moec.model.compiled",
    "LoadedModel": "moec.model.load",
    "MoecError": "moec.errors",
    "compare": "moec.inspect.comparison.compare",
    "compile": "moec.api",
    "compile_ranks": "moec.parallel.build",
    "describe": "moec.capture.behaviour.describe",
    "evaluate": "moec.optimise.evaluation.evaluate",
    "explore": "moec.inspect.exploration.explore",
    "load": "moec.model.load",
    "optimize": "moec.optimise.optimisation.optimize",
    "prepare": "moec.dynamo",
    "stats": "moec.dynamo",
    "transform": "moec.model.transformation.transform",
}
_COMPILES = {"compile", "compile_ranks", "describe", "optimize", "prepare", "transform"}
"""The names whose modules import TVM's compiler."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("moec")
    if name not in _WHERE:
        near = did_you_mean(name, __all__)
        raise AttributeError(f"module 'moec' has no attribute {name!r}{near}")
    # Only for the first import: to defer collections, Python counts the frozen objects one by one.
    imported = _WHERE[name] in sys.modules
    try:
        with ExitStack() as importing:
            if not imported:
                importing.enter_context(gc_deferred())
            if not imported and name in _COMPILES:
                importing.enter_context(symbols_read())
            module = importlib.import_module(_WHERE[name])
    except ModuleNotFoundError as error:
        if sentence := missing_extra(error):
            raise SetupError(sentence) from error
        raise
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
