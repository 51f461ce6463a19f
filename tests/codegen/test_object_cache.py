"""Kernels are compiled once: the parts of their key, and that a hit gives the same code."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
from tvm import relax
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec.cache import OBJECTS, Store, entries, store_in
from moec.codegen import object_cache
from moec.codegen.build import (
    compile_kernels,
    compile_module,
    context,
    executable,
    lowered_calls,
    options_of,
)
from moec.codegen.cpu.frame import IMPORT
from moec.codegen.object_cache import contents_of, named_by_content
from moec.errors import IRError
from moec.target.cpu import TARGETS, host
from tests.fresh import Program, Warm

ROOT = Path(__file__).resolve().parents[2]
LLVM = """define linkonce_odr float @moec_test(float %x) {{
  %y = fmul float %x, {}
  ret float %y
}}"""


def kernel(name: str = "scale", factor: float = 2.0, text: str = "") -> tvm.tirx.PrimFunc:
    """y[i] = x[i] * factor, by the function of `text` where there is one."""
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name})
            n = T.int64()
            x = T.match_buffer(T.arg("x", T.handle()), (n,), "float32")
            y = T.match_buffer(T.arg("y", T.handle()), (n,), "float32")
            with T.attr(tvm.tirx.const(0, "int32"), IMPORT, text), T.serial(0, n) as i:
                called = T.call_extern("float32", "moec_test", x[i])
                T.buffer_store(y, called if text else x[i] * T.float32(factor), [i])
    return builder.get()


def run(built: Any, name: str = "scale") -> list[float]:
    x, y = torch.tensor([1.0, -3.0]), torch.empty(2)
    built[name](tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(y))
    return y.tolist()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path / "cache")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that LLVM was given, in order."""
    names: list[str] = []
    original = object_cache.machine_code

    def counted(kernels: Any, *rest: Any) -> Any:
        names.extend(kernels)
        return original(kernels, *rest)

    monkeypatch.setattr(object_cache, "machine_code", counted)
    return names


def test_a_second_time_nothing_is_compiled(store: Store, compiled: list[str]) -> None:
    first = compile_kernels(kernel(), target=host(), store=store)
    again = compile_kernels(kernel(), target=host(), store=store)
    assert compiled == ["scale"]
    assert first.kernels == again.kernels
    assert run(first) == run(again) == [2.0, -6.0]


CODE = """
import sys
from pathlib import Path
from moec.cache import store_in
from moec.codegen import object_cache
from moec.codegen.build import compile_kernels
from moec.target.cpu import host
from tests.codegen.test_object_cache import kernel, run
def given_none(kernels, *rest):
    assert not kernels
    return {}
object_cache.machine_code = given_none
built = compile_kernels(kernel(), target=host(), store=store_in(Path(sys.argv[1])))
assert run(built) == [2.0, -6.0]
"""


def test_another_process_compiles_nothing(store: Store, warm: Warm) -> None:
    compile_kernels(kernel(), target=host(), store=store)
    done = warm.run(Program(CODE, arguments=(str(store.folder),)), ROOT)
    assert done.returncode == 0, done.stderr


def test_only_what_is_new_is_compiled(store: Store, compiled: list[str]) -> None:
    compile_kernels(kernel("a"), kernel("b", 3.0), target=host(), store=store)
    built = compile_kernels(kernel("b", 3.0), kernel("c", 4.0), target=host(), store=store)
    assert compiled == ["a", "b", "c"]
    assert run(built, "b") == [3.0, -9.0]
    assert run(built, "c") == [4.0, -12.0]


def test_threads_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [kernel(f"scale_{factor}", float(factor)) for factor in range(8)]
    objects = []
    for count in (1, 4):
        monkeypatch.setattr(object_cache, "available", lambda count=count: count)
        built = compile_kernels(*kernels, target=host(), store=Store(None), checked=True)
        objects.append(built.kernels)
    assert objects[0] == objects[1]


@pytest.mark.parametrize(
    "change", ["factor", "last bit", "text", "name", "target", "level", "checked", "versions"]
)
def test_what_differs_is_compiled(
    store: Store, compiled: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """LLVM functions that a kernel imports are not in the text that TVM prints of it."""
    before, after = kernel(text=LLVM.format("2.0")), kernel(text=LLVM.format("2.0"))
    options: dict[str, Any] = {}
    match change:
        case "factor":
            before, after = kernel(factor=2.0), kernel(factor=3.0)
        case "last bit":
            before, after = kernel(factor=1.0), kernel(factor=1.0 + 2.0**-23)
        case "text":
            after = kernel(text=LLVM.format("3.0"))
        case "name":
            after = kernel("other", text=LLVM.format("2.0"))
        case "target":
            options["target"] = TARGETS["generic"]
        case "level":
            options["opt_level"] = 0
        case "checked":
            options["checked"] = True
    compile_kernels(before, target=host(), store=store)
    assert len(compiled) == 1
    if change == "versions":
        monkeypatch.setattr(object_cache, "compiler_key", lambda: ("another TVM",))
    compile_kernels(after, **{"target": host(), "store": store, **options})
    assert len(compiled) == 2
    compile_kernels(after, **{"target": host(), "store": store, **options})
    assert len(compiled) == 2


def test_damage_is_compiled_anew_and_mended(store: Store, compiled: list[str]) -> None:
    compile_kernels(kernel(), target=host(), store=store)
    (entry,) = entries(store)
    assert entry.kind == OBJECTS
    content = entry.path.read_bytes()
    for damaged in (b"", content[:-1], content[:200] + b"\xff" + content[201:]):
        del compiled[:]
        entry.path.write_bytes(damaged)
        assert run(compile_kernels(kernel(), target=host(), store=store)) == [2.0, -6.0]
        assert compiled == ["scale"]
        assert entry.path.read_bytes() == content


def test_without_a_cache_everything_is_compiled(compiled: list[str]) -> None:
    for _ in range(2):
        assert run(compile_kernels(kernel(), target=host(), store=Store(None))) == [2.0, -6.0]
    assert compiled == ["scale", "scale"]


def test_a_function_that_nothing_defines_is_refused_and_not_kept(store: Store) -> None:
    declared = "declare float @moec_test(float)\n"
    for _ in range(2):
        with pytest.raises(IRError, match="kernels call moec_test, which nothing defines"):
            compile_kernels(kernel(text=declared), target=host(), store=store)
    assert not list(entries(store))


def module(*kernels: tvm.tirx.PrimFunc) -> tvm.IRModule:
    """main(x) calls each of the kernels, one on the result of the other."""
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            value: relax.Expr = x
            for number, function in enumerate(kernels):
                var = builder.add_func(function, f"scale_{number}")
                value = builder.emit(relax.call_tir(var, [value], x.ty))
            value = builder.emit_output(value)
        builder.emit_func_output(value)
    return builder.finalize()


def test_equal_kernels_of_a_module_are_one_whatever_their_numbers(
    store: Store, compiled: list[str]
) -> None:
    kernels = kernel("scale"), kernel("scale_2"), kernel("scale_3", 3.0)
    compile_module(module(*kernels), host(), store=store)
    assert sorted(name.rpartition("_")[0] for name in compiled) == ["scale", "scale", "shape_func"]
    del compiled[:]
    compile_module(module(kernel("scale_7", 3.0), kernel("scale_8", 4.0)), host(), store=store)
    (name,) = compiled
    assert name.startswith("scale_")


def test_the_addresses_of_sizes_change_no_name() -> None:
    def filled(order: list[int]) -> tvm.tirx.PrimFunc:
        allocated = [T.int64() for _ in order]
        sizes = [allocated[number] for number in order]
        with IRBuilder() as builder, T.prim_func():
            T.func_name("fill")
            T.func_attr({"global_symbol": "fill"})
            x = T.match_buffer(T.arg("x", T.handle()), sizes, "float32")
            with T.serial(0, sizes[0]) as i:
                T.buffer_store(x, T.float32(1), [i, 0, 0, 0, 0, 0])
        return builder.get()

    orders = itertools.islice(itertools.permutations(range(6)), 0, 720, 90)
    kernels = {str(order): filled(list(order)) for order in orders}
    assert len({form.script() for form in kernels.values()}) > 1
    assert len({*contents_of(kernels).values()}) == 1


def test_the_text_of_a_kernel_is_printed_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer than all else that a kernel from the cache needs."""
    names: list[str] = []
    original = tvm.tirx.PrimFunc.script

    def script(self: tvm.tirx.PrimFunc) -> str:
        names.append(str(self.attrs["global_symbol"]))
        return str(original(self))

    monkeypatch.setattr(tvm.tirx.PrimFunc, "script", script)
    for _ in range(2):
        del names[:]
        compile_module(module(kernel("scale"), kernel("scale_2", 3.0)), host(), store=store)
        assert sorted(names) == ["scale", "scale", "shape_func"]


def test_the_kernels_of_an_executable_are_those_whose_content_was_hashed() -> None:
    options = options_of(host(), 2)
    with context(), options:
        named, contents = named_by_content(lowered_calls(module(kernel(), kernel("b", 3.0))))
        kernels, _ = executable(named, options)
    assert contents.keys() == kernels.keys()
    for name, function in kernels.items():
        assert function.same_as(named[name])


def test_equal_functions_of_two_objects_are_linked_as_one(store: Store) -> None:
    text = LLVM.format("2.0")
    one, two = kernel("one", text=text), kernel("two", text=text + "\n; the same function\n")
    built = compile_kernels(one, two, target=host(), store=store)
    assert run(built, "one") == run(built, "two") == [2.0, -6.0]


def test_a_folder_that_cannot_be_used_costs_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="file/cache is not used"):
        assert run(compile_kernels(kernel(), target=host())) == [2.0, -6.0]


def test_a_folder_that_can_only_be_read_gives_what_it_has(
    store: Store, compiled: list[str]
) -> None:
    compile_kernels(kernel(), target=host(), store=store)
    assert store.folder is not None
    os.chmod(store.folder / OBJECTS, 0o500)
    try:
        assert run(compile_kernels(kernel(), target=host(), store=store)) == [2.0, -6.0]
    finally:
        os.chmod(store.folder / OBJECTS, 0o700)
    assert compiled == ["scale"]
