"""Loops with little work stay on the calling thread, with the same bits and no second body."""

from __future__ import annotations

import os

import pytest
import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.gemm.linear import linear
from moec.codegen.cpu.pipeline import PIPELINE
from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import host
from tests.fresh import Program

TARGET = tvm.target.Target(host().tvm())


def code(kernel, pipeline):
    name = str(kernel.attrs["global_symbol"])
    return tvm.tirx.build(tvm.IRModule({name: kernel}), TARGET, pipeline).inspect_source("ll")


def test_the_body_is_compiled_once():
    """As many lines compute on vectors as without the choice (LLVM may still copy small ones)."""
    kernel = linear(host(), LinearSpec(80, 65, "float32"))
    plain, chosen = (code(kernel, pipeline).count("x float>") for pipeline in ("default", PIPELINE))
    assert 500 < chosen < plain * 1.05


SCRIPT = """
import os, sys, torch, tvm
from moec.codegen.cpu.gemm.layout import Layout, LinearSpec
from moec.codegen.cpu.gemm.linear import linear
from moec.codegen.cpu.gemm.pack import pack
from moec.codegen.cpu.parallel import WORTH_SHARING
from moec.codegen.cpu.pipeline import PIPELINE
from moec.target.cpu import host
torch.manual_seed(0)
spec = LinearSpec(300, 129, "float32")
target = tvm.target.Target(host().tvm())
packed = torch.from_numpy(pack(Layout(spec, host()), torch.randn(1, 300, 129)))
module = tvm.IRModule({"linear": linear(host(), spec)})
chosen = tvm.tirx.build(module, target, PIPELINE)["linear"]
always = tvm.compile(module, target)["linear"]
threads = lambda: len(os.listdir("/proc/self/task"))
few = (WORTH_SHARING - 4 * packed.numel()) // (300 * 129)
x = torch.randn(few + 1, 129)
def run(kernel, x):
    y = torch.full((len(x), 300), 7.0)
    kernel(*map(tvm.runtime.from_dlpack, (x, packed, y)))
    return y
before = threads()
small = run(chosen, x[:few].contiguous())
assert threads() == before, "a small product woke a thread"
large = run(chosen, x)
assert threads() == before + 1, "a large product did not wake a thread"
assert torch.equal(large[:few], small)
assert torch.equal(large, run(always, x))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor has one thread")
def test_threads_wake_for_as_much_as_they_are_worth(warm, tmp_path, monkeypatch):
    """One row decides; the pool of a thread is made when that thread first shares a loop."""
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    result = warm.run(Program(SCRIPT), tmp_path)
    assert result.returncode == 0, result.stderr


def filled(sums, count=4):
    """y[i] = i, by a loop of `sums`."""
    with kernel("f") as frame:
        n = T.int64()
        y = argument("y", (n,), "int64")
        with parallel.parallel_for(count, sums(n)) as i:
            T.buffer_store(y, T.cast(i, "int64"), [i])
    return frame.function


@pytest.mark.parametrize(
    ("sums", "launches", "calls"),
    [
        (lambda n: n, 1, 1),
        (lambda n: T.int64(parallel.WORTH_SHARING), 1, 0),
        (lambda n: T.int64(parallel.WORTH_SHARING - 1), 0, 0),
    ],
    ids=["unknown", "enough", "too little"],
)
def test_work_that_is_known_leaves_one_loop(sums, launches, calls):
    text = code(filled(sums), PIPELINE)
    assert text.count("ptr nonnull @__tvm_parallel_lambda,") == launches
    assert ("f_task_1" in text) == bool(calls)
