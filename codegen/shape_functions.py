"""Functions that compute sizes, in a fixed order.

TVM collects the sizes of a program that follow from those of its inputs in functions, each of which
stores them into an array, in the order of addresses in memory. So these functions would differ from
process to process, and their object files would never be in the cache.
"""

from __future__ import annotations

import tvm
from tvm.ir import TensorLoad
from tvm.tirx import BufferStore, IntImm, PrimFunc, SeqStmt
from tvm_ffi.structural import structural_walk


def in_fixed_order(module: tvm.IRModule) -> tvm.IRModule:
    """The module with the stores of each such function in the order of the array."""
    functions = {
        var: _ordered(function) if isinstance(function, PrimFunc) else function
        for var, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _ordered(function: PrimFunc) -> PrimFunc:
    """The function, unless it is another one, or one store needs what another has stored."""
    body = function.body
    if "tirx.is_host_func" not in (function.attrs or {}) or not isinstance(body, SeqStmt):
        return function
    stores = [store for store in body.seq if isinstance(store, BufferStore)]
    indices = [_index(store) for store in stores]
    read: set[int | None] = set()
    structural_walk(body, (TensorLoad, lambda load: read.add(_index(load))))
    written = set(indices)
    if len(written) < len(body.seq) or None in written | read or written & read:
        return function
    order = sorted(range(len(stores)), key=lambda number: indices[number] or 0)
    return function.with_body(SeqStmt([stores[number] for number in order]))


def _index(access: TensorLoad | BufferStore) -> int | None:
    """The index, where it is a number."""
    (index,) = access.indices
    return int(index.value) if isinstance(index, IntImm) else None
