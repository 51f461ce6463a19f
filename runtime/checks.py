"""Checks of a call's inputs: one sentence for the first wrong input.

Tensors of numpy and of torch are treated alike, through `dtype`, `shape` and `min`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from moec.errors import InputError
from moec.runtime.dtypes import NUMPY, Array, name_of
from moec.runtime.package import Function, Port, Size
from moec.runtime.process.memory_limit import free_in_groups
from moec.runtime.sizes import expressions as sizes
from moec.spelling import did_you_mean

CPU = "cpu"
DENSE = "torch.strided"
SMALL = 1 << 26  # bytes of outputs below which the free memory is not checked


def show_port(port: Port) -> str:
    return f"{port.name}: {port.dtype}{show_shape(port.shape)}"


def show_bytes(size: int) -> str:
    """In the largest unit of which it has at least one."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def show_shape(shape: Iterable[Size]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_inputs(
    function: Function, inputs: Mapping[str, Any], device: str = CPU
) -> dict[str, int]:
    """The values of the named sizes in this call.

    Raises InputError, naming the input, its property and the expected one: for names, dtypes,
    ranks, sizes that disagree or exceed their bounds, and indices beyond their table. `device` is
    the device that the inputs must be on (torch's name): cpu, cuda:0.
    """
    _check_names(function, inputs)
    for port in function.inputs:
        _check_type(port, inputs[port.name], device)
    env = _bind(function, inputs)
    for port in function.inputs:
        # On a GPU, values are not checked: kernels read no row outside of a table.
        if port.name in function.index_ranges and device == CPU:
            low, high = (sizes.evaluate(n, env) for n in function.index_ranges[port.name])
            if low is not None and high is not None:  # else it depends on a size in the graph
                _check_range(port, inputs[port.name], low, high)
    return env


def _check_names(function: Function, inputs: Mapping[str, Any]) -> None:
    names = [port.name for port in function.inputs]
    if inputs.keys() == set(names):
        return
    ports_text = "; ".join(map(show_port, function.inputs)) or "nothing"
    unknown = [name for name in inputs if name not in names]
    missing = [name for name in names if name not in inputs]
    if unknown:
        hint = did_you_mean(unknown[0], missing or names)
        raise InputError(f"there is no input {unknown[0]!r}{hint} (the model takes {ports_text})")
    if missing:
        raise InputError(f"input {missing[0]!r} is missing (the model takes {ports_text})")


def _check_type(port: Port, value: Any, device: str) -> None:
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise InputError(
            f"input {port.name!r} is a {type(value).__name__}, expected a tensor "
            f"{port.dtype}{show_shape(port.shape)}"
        )
    layout = str(getattr(value, "layout", DENSE))
    if layout != DENSE:
        raise InputError(f"input {port.name!r} has the layout {layout}; give x.to_dense()")
    dtype = name_of(value.dtype)
    if dtype != port.dtype:
        raise InputError(f"input {port.name!r} is {dtype}, expected {port.dtype}; convert it")
    where = str(getattr(value, "device", CPU))
    if where != device and f"{where}:0" != device:
        runs = "the CPU" if device == CPU else f"{device}: give it tensors of torch on that GPU"
        raise InputError(f"input {port.name!r} is on {where}, and the model runs on {runs}")
    if len(value.shape) != len(port.shape):
        raise InputError(
            f"input {port.name!r} has {len(value.shape)} axes {show_shape(value.shape)}, "
            f"expected {len(port.shape)}: {show_shape(port.shape)}"
        )


def _bind(function: Function, inputs: Mapping[str, Any]) -> dict[str, int]:
    env: dict[str, int] = {}
    learned: dict[str, str] = {}  # the axis that determined each size
    axes = [
        (port, axis, size, int(inputs[port.name].shape[axis]))
        for port in function.inputs
        for axis, size in enumerate(port.shape)
    ]
    named = [axis for axis in axes if not isinstance(axis[2], int)]
    # Sizes that are a single name come first; only then those such as 2*T determine a name.
    for port, axis, size, length in sorted(named, key=lambda a: sizes.names(a[2]) != {a[2]}):
        solved = sizes.solve(size, length)
        if solved is not None and solved[0] not in env:
            name, value = solved
            env[name], learned[name] = value, f"axis {axis} of {port.name!r}"
            low, high = function.sizes.get(name, (0, None))
            if value < low or (high is not None and value > high):
                limits = f"from {low} to {high}" if high is not None else f"at least {low}"
                what = f", so {name} is {value}" if size != name else ""
                zero = " (it has no tokens)" if length == 0 else ""
                line = f" ({function.causes[name]})" if name in function.causes else ""
                raise InputError(
                    f"axis {axis} of input {port.name!r} is {length}{zero}{what}, "
                    f"and the model was compiled for {name} {limits}{line}"
                )
    _check_expressions(function, learned, env)
    for port, axis, size, length in axes:
        expected = sizes.evaluate(size, env)
        if expected == length:
            continue
        where = f"axis {axis} of input {port.name!r} is {length}, expected"
        if expected is not None:
            causes = _causes(size, learned, env)
            reason = f" ({size}), because {causes}" if causes else ""
            raise InputError(f"{where} {expected}{reason}")
        if len(sizes.names(size)) == 1:
            raise InputError(f"{where} a size of the form {size}")
        # Sizes that no axis determines are checked by the compiled code.
    return env


def _check_expressions(
    function: Function, learned: Mapping[str, str], env: Mapping[str, int]
) -> None:
    """The bounds of products of sizes, of remainders and of other expressions."""
    for size, (least, most) in function.sizes.items():
        if size in env or not sizes.names(size) <= env.keys():
            continue
        count = sizes.evaluate(size, env)
        if count is not None and least <= count and (most is None or count <= most):
            continue
        causes = _causes(size, learned, env)
        line = f" ({function.causes[size]})" if size in function.causes else ""
        if multiple := sizes.multiple_of(size):
            dividend, number = multiple
            raise InputError(f"{dividend} must be a multiple of {number}, and {causes}{line}")
        limits = f"at least {least}" if count is None or count < least else f"at most {most}"
        raise InputError(
            f"{size} is {count}, because {causes}, and the model was compiled for {limits}{line}"
        )


def _causes(size: Size, learned: Mapping[str, str], env: Mapping[str, int]) -> str:
    return ", ".join(f"{learned[n]} gives {n} = {env[n]}" for n in sorted(sizes.names(size)))


def _check_range(port: Port, value: Any, low: int, high: int) -> None:
    array = np.asarray(value)
    if array.size == 0 or (array.min() >= low and array.max() <= high):
        return
    at = np.argwhere((array < low) | (array > high))[0]
    if high < low:
        raise InputError(f"input {port.name!r} indexes a table that has no rows in this call")
    raise InputError(
        f"input {port.name!r} holds {array[tuple(at)]} at {show_shape(at)}, and its values must "
        f"be from {low} to {high}"
    )


def check_memory(
    function: Function, env: Mapping[str, int], free_memory: Callable[[], int]
) -> None:
    """Raise InputError where the outputs of a call with these sizes exceed the free memory.
    Intermediate values need more, which is not known here."""
    size = 0
    for port in function.outputs:
        shape = [sizes.evaluate(dim, env) for dim in port.shape]
        size += math.prod(n or 0 for n in shape) * NUMPY[port.dtype].itemsize
    if size < SMALL:
        return
    free = free_memory()
    if size > free:
        raise InputError(
            f"the outputs take {show_bytes(size)}, and {show_bytes(free)} of memory are free; "
            "give fewer or shorter inputs at once"
        )


def free_memory() -> int:
    """The bytes that a process may still allocate, by the system and its control groups; unlimited
    if neither is known."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            entries = dict(line.split(":", 1) for line in lines)
        free = int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = sys.maxsize
    return int(min(free, free_in_groups()))


def destination_shapes(
    function: Function, inputs: Mapping[str, Any]
) -> tuple[tuple[Port, tuple[int, ...]], ...]:
    """The outputs that are written into memory of the caller, with their shapes in this call.

    Raises InputError as `check_inputs` does for shapes, ValueError where a shape is unknown.
    """
    env = _bind(function, inputs)
    shapes = []
    for port in function.outputs:
        if port.name in function.destinations:
            shape = [sizes.evaluate(size, env) for size in port.shape]
            if None in shape:
                raise ValueError(f"the shape {show_shape(port.shape)} of {port.name} is unknown")
            shapes.append((port, tuple(n for n in shape if n is not None)))
    return tuple(shapes)


def check_no_nan(kind: str, arrays: Mapping[str, Array]) -> None:
    """Raise InputError where a float array holds NaN; `kind` is "input" or "output"."""
    for name, array in arrays.items():
        if array.dtype.kind not in "fcV" or array.size == 0:
            continue
        is_nan = np.isnan(array)
        if is_nan.any():
            at = np.argwhere(is_nan)[0]
            why = (
                "no expert can be chosen for such a token"
                if kind == "input"
                else "the inputs caused it, or the weights contain it"
            )
            raise InputError(f"{kind} {name!r} contains NaN, first at {show_shape(at)}: {why}")
