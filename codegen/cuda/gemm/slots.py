"""Products of experts in slots: the host launches them in waves (codegen/cuda/expert_store.c).

    wave w      the experts e with table[E + e] = w; the weights of e are in slot table[e]
    begin       the launch waits for the copies into these slots
    end         the slots may be filled with experts of later waves

A launch computes the rows of the experts of its wave as one launch for all experts would compute
them: which kernel runs depends on the number of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cuda.gemm.product import Product
from moec.codegen.cuda.gemm.tiles import Wave


def in_waves(p: Product, launch: Callable[[Product], None]) -> None:
    """Emits the host code that runs launch(product) once, or with slots for each wave."""
    if p.slots is None:
        launch(p)
        return
    key, table = p.slots.key, p.slots.table
    waves = T.bind(T.call_extern("int32", "device_store_waves", key))
    with T.serial(0, waves) as wave:
        _checked("device_store_begin", key, wave)
        launch(replace(p, wave=Wave(table, wave)))
        _checked("device_store_end", key, wave)


def _checked(name: str, key: Expr, wave: Expr) -> None:
    """Calls a function of the store that returns -1 after it has set an error."""
    with T.If(T.call_extern("int32", name, key, wave) < 0), T.Then():
        T.evaluate(tirx.tvm_throw_last_error())
