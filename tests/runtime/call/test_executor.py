"""The results of a compiled model, for any memory layout of its inputs and any way to call it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import InputError
from moec.runtime.call.executor import Executor, load
from moec.runtime.dtypes import NUMPY, name_of
from moec.runtime.package import Function, Package, Port, StatePort
from moec.target.cpu import CpuNeeds
from tests.runtime import toy

# Four products and three sums of float32, each rounded once: 7 * 2**-24 of values below 10.
CLOSE = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def model(original: Path) -> Executor:
    return load(original)


@given(rows=st.integers(0, 64), seed=st.integers(0, 99))
def test_numbers(model: Executor, package: Package, rows: int, seed: int) -> None:
    inputs = toy.inputs(rows, seed)
    y = toy.expected(package, inputs)
    module = model(inputs)
    np.testing.assert_allclose(module["y"], y, **CLOSE)
    np.testing.assert_array_equal(module["top"], -np.sort(-module["y"], axis=1)[:, :2])
    assert module["low"].dtype == NUMPY["bf16"]
    np.testing.assert_array_equal(module["low"], module["y"].astype(NUMPY["bf16"]))


def test_torch_in_torch_out(model: Executor, package: Package) -> None:
    inputs = toy.inputs(5)
    module = model({name: torch.from_numpy(a) for name, a in inputs.items()})
    assert {name: v.dtype for name, v in module.items()} == {
        "y": torch.float32,
        "top": torch.float32,
        "low": torch.bfloat16,
    }
    np.testing.assert_allclose(module["y"].numpy(), toy.expected(package, inputs), **CLOSE)
    needs_grad = torch.from_numpy(inputs["x"]).requires_grad_()
    again = model({"x": needs_grad, "ids": torch.from_numpy(inputs["ids"])})
    assert torch.equal(module["y"], again["y"])


def test_memory_that_kernels_cannot_read_is_copied(model: Executor, package: Package) -> None:
    inputs = toy.inputs(6)
    y = model(inputs)["y"]
    off = np.empty(6 * 4 + 1, np.float32)[1:].reshape(6, 4)  # 4 bytes beyond an aligned address
    off[...] = inputs["x"]
    wide = np.zeros((6, 8), np.float32)
    wide[:, ::2] = inputs["x"]
    frozen = inputs["x"].copy()
    frozen.flags.writeable = False
    turned = np.asfortranarray(inputs["x"])
    as_torch = torch.from_numpy(wide)[:, ::2]
    for x in (off, wide[:, ::2], frozen, turned, as_torch, torch.from_numpy(off)):
        ids = torch.from_numpy(inputs["ids"]) if isinstance(x, torch.Tensor) else inputs["ids"]
        np.testing.assert_array_equal(np.asarray(model({"x": x, "ids": ids})["y"]), y)
    np.testing.assert_array_equal(off, inputs["x"])


def test_results_outlive_later_calls_and_the_model(original: Path) -> None:
    model = load(original)
    first = model(toy.inputs(8))["y"]
    before = first.copy()
    for seed in range(20):
        model(toy.inputs(8, seed))
    del model
    np.testing.assert_array_equal(first, before)
    first[...] = 0  # results belong to the caller


def test_states_live_between_calls_and_start_anew(original: Path) -> None:
    model = load(original)
    for count in (1, 2, 3):
        model(toy.inputs())
        assert model.states()["count"].tolist() == [count]
    model.reset()
    assert model.states()["count"].tolist() == [0]
    with pytest.raises(InputError):
        model({})
    assert model.states()["count"].tolist() == [0]


def test_a_state_without_an_array_starts_from_zeros(package: Package) -> None:
    states = tuple(replace(port, initial="") for port in package.main.states)
    main = replace(package.main, states=states)
    model = Executor(replace(package, functions={"main": main}))
    assert model.states()["count"].tolist() == [0]


def test_threads_take_turns(original: Path, package: Package) -> None:
    model = load(original)
    cases = [toy.inputs(rows, seed) for seed, rows in enumerate([1, 64, 0, 17] * 25)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model, cases))
    for case, result in zip(cases, results, strict=True):
        np.testing.assert_allclose(result["y"], toy.expected(package, case), **CLOSE)
    assert model.states()["count"].tolist() == [len(cases)]


def test_a_package_runs_without_an_artifact(package: Package) -> None:
    inputs = toy.inputs()
    y = toy.expected(package, inputs)
    np.testing.assert_allclose(Executor(package)(inputs)["y"], y, **CLOSE)


def test_one_result_may_come_bare() -> None:
    package = toy.language_model()
    ids = np.array([[1, 2, 7]])
    result = Executor(package)({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert result["logits"].argmax(-1).tolist() == [[2, 3, 0]]


def test_results_do_not_share_memory_with_inputs_weights_or_states() -> None:
    """A model that returns its inputs: the caller's memory stays the caller's."""
    package = echo()
    model = Executor(package)
    for x in (np.ones((2, 2), np.float32), torch.ones(2, 2)):
        module = model({"x": x})
        for value in module.values():
            value[...] = 5
        assert np.asarray(x).tolist() == [[1, 1], [1, 1]]
        model.reset()
        again = model({"x": x})
        assert np.asarray(again["w"]).tolist() == [3, 4]
        assert np.asarray(again["s"]).tolist() == [0]
    assert model.states()["s"].tolist() == [0]


def echo() -> Package:
    from tvm import relax
    from tvm.script import relax as R

    x = relax.Var("x", R.Tensor((2, 2), "float32"))
    s = relax.Var("s", R.Tensor((1,), "float32"))
    w = relax.Var("w", R.Tensor((2,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, s, w]):
        with builder.dataflow():
            output = builder.emit_output(relax.Tuple([x, w, s, s]))
        builder.emit_func_output(output)
    main = Function(
        inputs=(Port("x", "f32", (2, 2)),),
        outputs=(Port("x", "f32", (2, 2)), Port("w", "f32", (2,)), Port("s", "f32", (1,))),
        states=(StatePort("s", "f32", (1,)),),
        params=(Port("w", "f32", (2,)),),
    )
    return Package(
        target=CpuNeeds("generic"),
        functions={"main": main},
        arrays={"w": np.array([3, 4], np.float32)},
        library=toy.export(builder.get()),
    )


def test_complex_numbers_cross_as_pairs() -> None:
    """Port c64 [2] is the VM's f32 [2, 2]."""
    package = echo()
    main = replace(
        package.main,
        inputs=(Port("x", "c64", (2,)),),
        outputs=(Port("x", "c64", (2,)), Port("w", "f32", (2,)), Port("s", "f32", (1,))),
    )
    x = np.array([1 + 2j, 3 - 4j], np.complex64)
    model = Executor(replace(package, functions={"main": main}))
    np.testing.assert_array_equal(model({"x": x})["x"], x)
    result = model({"x": torch.from_numpy(x).conj()})["x"]
    assert torch.equal(result, torch.from_numpy(x.conj()))


def test_names_of_dtypes() -> None:
    for name, dtype in NUMPY.items():
        assert name_of(dtype) == name
    spelled: Mapping[Any, str] = {
        torch.float32: "f32",
        torch.bfloat16: "bf16",
        torch.bool: "bool",
        torch.complex64: "c64",
        torch.float8_e4m3fn: "float8_e4m3fn",
        np.dtype(">f4"): ">f4",
    }
    assert {dtype: name_of(dtype) for dtype in spelled} == spelled


def test_loads_neither_torch_nor_the_compiler(original: Path) -> None:
    script = f"""
import sys
from moec.runtime.call.executor import load
load({str(original)!r})
loaded = open("/proc/self/maps").read()
print(sorted({{"torch", "tvm", "sympy", "transformers", "click"}} & sys.modules.keys()))
print("libtvm_compiler" in loaded, "libtvm_runtime" in loaded)
import torch
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["[]", "False True"]


def test_every_processor_works_unless_told_otherwise() -> None:
    script = """
from moec.runtime.device.library import tvm_ffi
from moec.runtime.process.threads import available
print(tvm_ffi().get_global_func("runtime.NumThreads")(), available())
"""
    plain = {k: v for k, v in os.environ.items() if k != "TVM_NUM_THREADS"}
    variables: dict[str, str]
    for variables in ({}, {"TVM_NUM_THREADS": "1"}):
        process = subprocess.run(
            [sys.executable, "-c", script], env=plain | variables, capture_output=True, text=True
        )
        threads, processors = process.stdout.split()
        assert threads == ("1" if variables else processors)
