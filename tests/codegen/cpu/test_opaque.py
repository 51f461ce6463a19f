"""Numbers that kernels bind are hidden from TVM's simplifier, except those in sizes."""

from __future__ import annotations

from typing import Any

import torch
import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.build import assembly, compile_kernels
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.opaque import in_memory, opaque
from moec.codegen.cpu.pipeline import PIPELINE
from moec.target.cpu import host


def with_arguments(body: Any) -> tvm.tirx.PrimFunc:
    with kernel("kernel") as frame:
        n = T.int64()
        x = argument("x", (n,), "float32")
        y = argument("y", (n,), "float32")
        body(n, x, y)
    return frame.function


def shifted(n: Any, x: Any, y: Any) -> None:
    half = T.bind(T.truncdiv(n, T.int64(2)))
    remaining = T.alloc_buffer((half,), "float32")
    with T.serial(0, half) as i:
        T.buffer_store(remaining, x[i], [i])
    with T.serial(0, n) as i:
        at = T.bind(T.truncmod(i, half))
        same = T.bind(at)
        first = T.bind(i < half)
        one = T.bind(T.int64(1))
        value = T.bind(remaining[same])
        with T.If(first):
            with T.Then():
                T.buffer_store(y, value, [i])
            with T.Else():
                T.buffer_store(y, -value, [i - one + 1])


def test_numbers_are_hidden_but_for_sizes_and_names() -> None:
    text = opaque(with_arguments(shifted), None, None).script()
    assert "T.Div(" in text  # the size of a buffer
    assert 'moec_number_64", T.Div' not in text
    assert text.count('T.call_extern("int64", "moec_number_64"') == 1
    assert text.count('T.call_extern("bool", "moec_number_1"') == 1


def test_the_code_generator_reads_integers_from_memory() -> None:
    text = in_memory(opaque(with_arguments(shifted), None, None), None, None).script()
    assert "number: T.int64 = T.truncmod(" in text
    assert "T.let[T.int64] = number" in text
    assert "moec_number_64" not in text
    assert text.count('T.call_extern("bool", "moec_number_1"') == 1


def test_what_binds_nothing_is_left_as_it_is() -> None:
    def copied(n: Any, x: Any, y: Any) -> None:
        with T.serial(0, n) as i:
            T.buffer_store(y, x[i], [i])

    plain = with_arguments(copied)
    assert opaque(plain, None, None).same_as(plain)


def test_numbers_are_the_same() -> None:
    x, y = torch.arange(1.0, 9.0), torch.empty(8)
    built = compile_kernels(with_arguments(shifted), target=host())
    built["kernel"](tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(y))
    assert torch.equal(y, torch.cat([x[:4], -x[:4]]))


def test_nothing_is_left_of_the_calls() -> None:
    code = assembly(with_arguments(shifted), host())
    assert "moec_number" not in code


def test_the_simplifier_is_given_the_calls() -> None:
    """Without them it took 12 s for the products of a small model in bfloat16."""
    calls: dict[str, int] = {}

    @tvm.ir.instrument.pass_instrument
    class Seen:
        def run_before_pass(self, module: tvm.IRModule, info: Any) -> None:
            calls.setdefault(str(info.name), module.script().count("moec_number_64"))

    module = tvm.IRModule({"kernel": with_arguments(shifted)})
    with tvm.transform.PassContext(opt_level=3, instruments=[Seen()]):
        tvm.compile(module, tvm.target.Target(host().tvm()), tir_pipeline=PIPELINE)
    simplified = [count for name, count in calls.items() if name.endswith("StmtSimplify")]
    assert simplified
    assert all(simplified)
