"""Everything that is no MoE block: compiled by Inductor, or run operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import fx

from moec.errors import UsageError
from moec.torch_private import aot_autograd, make_boxed_func, min_cut_rematerialization_partition

Callee = Callable[..., Any]


def compile_rest(module: fx.GraphModule, inputs: Sequence[Any], how: str) -> Callee:
    """A function for the graph, by `how`: "inductor" or "eager". Raises UsageError where Inductor
    has no C++ compiler."""
    if how == "inductor":
        return _inductor(module, inputs)
    callee: Callee = aot_autograd(
        fw_compiler=_as_it_is, partition_fn=min_cut_rematerialization_partition
    )(module, inputs)
    return callee


def _as_it_is(module: fx.GraphModule, inputs: Sequence[Any]) -> Callee:
    callee: Callee = make_boxed_func(module.forward)
    return callee


def _inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> Callee:
    # Inductor takes long to import
    from moec.torch_private import InvalidCxxCompiler, compile_fx, get_cpp_compiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            "Inductor compiles what is no MoE block, and finds no C++ compiler: install g++ or "
            'clang++, or run the rest as it is with options={"rest": "eager"}'
        ) from error
    return cast(Callee, compile_fx(module, list(inputs)))
