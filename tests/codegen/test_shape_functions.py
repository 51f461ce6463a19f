"""Functions that compute sizes are the same in each process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec.codegen.build import in_fixed_order


def text(stores: Sequence[tuple[int, int]], attribute: str = "tirx.is_host_func") -> str:
    """A function that sets H[a] to 3 * H[b] for each (a, b), after `in_fixed_order`."""
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("shape_func")
            T.func_attr({"global_symbol": "shape_func", attribute: True})
            sizes = T.match_buffer(T.arg("H", T.handle()), (8,), "int64")
            for index, read in stores:
                T.buffer_store(sizes, sizes[read] * T.int64(3), [index])
    module = in_fixed_order(tvm.IRModule({"shape_func": builder.get()}))
    return str(module["shape_func"].script())


def test_stores_have_the_order_of_the_array() -> None:
    """TVM makes them in the order of addresses, so that their object files were never in the
    cache of another process."""
    assert text([(4, 1), (3, 0), (2, 0)]) == text([(2, 0), (4, 1), (3, 0)])
    lines = text([(4, 1), (2, 0)]).splitlines()
    assert [line.strip() for line in lines[-2:]] == [
        "buffer[2] = buffer[0] * T.int64(3)",
        "buffer[4] = buffer[1] * T.int64(3)",
    ]


@pytest.mark.parametrize("stores", [[(4, 1), (3, 4)], [(4, 1), (4, 0), (2, 0)]])
def test_stores_that_need_their_order_keep_it(stores: list[tuple[int, int]]) -> None:
    """One reads what another has stored, or two store at one place."""
    assert text(stores) == text(stores, "tirx.noalias").replace("tirx.noalias", "tirx.is_host_func")
    assert text(stores) != text(stores[::-1])


def test_other_functions_keep_their_order() -> None:
    stores = [(4, 1), (3, 0)]
    assert text(stores, "tirx.noalias") != text(stores[::-1], "tirx.noalias")
