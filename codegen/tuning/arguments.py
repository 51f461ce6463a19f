"""Random arguments of a product kernel, from the shapes of its buffers: shapes of weights are
constant, all others vary.

There are enough copies of the weights that each call reads them from memory, not from the cache.
Calls with the same rows route them to other experts. No number is denormal, because denormals slow
down arithmetic.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch import Tensor
from tvm.tirx import PrimFunc

from moec.codegen.tuning.tunable import Tunable
from moec.errors import NoMatch
from moec.runtime.process.memory_limit import free_in_groups
from moec.target.cpu import last_cache

_BLOCK = 1 << 20  # elements that are drawn; a larger tensor repeats them
COLD = 4  # bytes read between two reads of one copy, as a multiple of the last cache


@dataclass(frozen=True)
class BenchArguments:
    """`draw(tokens)` draws rows and the number of rows of each expert. It returns a function from
    the index of a copy of the weights to all arguments of one call, in the kernel's order."""

    copies: int
    draw: Callable[[int], Callable[[int], list[Any]]]


def arguments(kernel: Tunable, prim_func: PrimFunc, footprint: int) -> BenchArguments:
    """Arguments for measurements. `footprint` is the bytes of all weights of the model: weights
    that fit the cache together are measured warm.

    Raises NoMatch if the copies of the weights exceed the free memory.
    """
    shapes = [tuple(buffer.shape) for buffer in prim_func.params]
    dtypes = [str(buffer.dtype) for buffer in prim_func.params]
    held = [i for i, shape in enumerate(shapes) if len(shape) > 1 and _is_fixed(shape)]
    size = sum(math.prod(map(int, shapes[i])) * getattr(torch, dtypes[i]).itemsize for i in held)
    free = int(min(free_memory(), free_in_groups()))
    if size > free // 2:
        raise NoMatch(
            f"--tune needs {size / 1e9:.1f} GB for weights, and {free / 1e9:.1f} GB are free"
        )
    needed = -(-min(footprint, COLD * last_cache()) // max(size, 1))
    copies = max(1, min(needed, free // 2 // max(size, 1)))
    weights = [{i: _random(dtypes[i], shapes[i]) for i in held} for _ in range(copies)]
    experts = kernel.work.experts
    many = shapes[-1][0]  # rows of y, which comes last

    def draw(tokens: int) -> Callable[[int], list[Any]]:
        rows = tokens * kernel.work.top_k
        chosen = torch.rand(tokens, experts).topk(min(kernel.work.top_k, experts)).indices
        drawn = {}
        for i, shape in enumerate(shapes):
            if len(shape) > 1 and i not in held:
                sizes = [_size(dim, many, rows, tokens) for dim in shape]
                drawn[i] = _random(dtypes[i], sizes)

        def call(copy: int) -> list[Any]:
            # The same rows go to other experts, because the weights of the last call are in the
            # cache.
            order, ends = sorted_by_expert(torch.randperm(experts)[chosen], experts)
            tensors = {**drawn, **weights[copy % copies]}
            for i, shape in enumerate(shapes):
                if len(shape) == 1:  # the one whose size is known is `ends`
                    tensors[i] = ends if _is_fixed(shape) else order
            return [tvm.runtime.from_dlpack(tensors[i]) for i in range(len(shapes))]

        return call

    return BenchArguments(copies, draw)


def sorted_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """order i32[tokens * top_k] and ends i32[experts] of the choices [tokens, top_k]."""
    flat = chosen.flatten()
    ends = torch.bincount(flat, minlength=experts).cumsum(0)
    return flat.sort(stable=True).indices.int(), ends.int()


def _is_fixed(shape: Sequence[Any]) -> bool:
    return all(isinstance(dim, tvm.tirx.IntImm) for dim in shape)


def _size(dim: Any, many: Any, rows: int, tokens: int) -> int:
    """The value of a dim: `many` is the variable of the rows of y, any other that of tokens."""
    if isinstance(dim, tvm.tirx.IntImm):
        return int(dim)
    return rows if dim.same_as(many) else tokens


def _random(kind: str, shape: Sequence[Any]) -> Tensor:
    dtype, sizes = getattr(torch, kind), [int(size) for size in shape]
    tensor = torch.empty(math.prod(sizes), dtype=dtype)
    count = min(tensor.numel(), _BLOCK)
    if dtype is torch.uint8:  # scales of mxfp4 are exponents
        block = torch.randint(120, 135, (count,), dtype=dtype)
    elif dtype is torch.int32:  # pairs of bf16, or codes, which may be anything
        block = torch.randn(2 * count).bfloat16().view(torch.int32)
    else:
        block = torch.randn(count).to(dtype)
    for start in range(0, tensor.numel(), _BLOCK):
        part = tensor[start : start + _BLOCK]
        part.copy_(block[: part.numel()])
    return tensor.view(sizes)


def free_memory() -> int:
    """The free memory of this machine in bytes; 4 GB if the system does not report it."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30 if not hasattr(os, "sysconf") else _pages()


def _pages() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 4 << 30
