"""A backend that compiles nothing: the rules and the packed weights of CPUs, but no code.

It shows within a second what is recognised, which kernel each op gets, and how large an artifact
would be. A model made with it cannot be run; `moec run --rebuild` compiles its graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import IRModule

from moec.cache import Store
from moec.codegen.backend import Backend
from moec.codegen.backends.cpu.backend import CPU
from moec.runtime.package import BuiltLibrary


def _library(
    modules: Mapping[str, IRModule], target: Any, opt_level: int, store: Store | None
) -> BuiltLibrary:
    return BuiltLibrary()


NULL = Backend("null", CPU.rules, CPU.kernels, CPU.loop, _library)
