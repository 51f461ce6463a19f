"""Relax, or kernels alone -> object files to be linked. TVM plans memory, and LLVM makes the
code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tvm
from tvm import relax
from tvm.ir import TensorLoad
from tvm.relax import _ffi_api
from tvm.relax.vm_build import _vmcodegen
from tvm.tirx import BufferStore, IntImm, PrimFunc, SeqStmt
from tvm_ffi.structural import structural_walk

from moec.cache import Store, default_store
from moec.codegen.cpu.link import Exportable, linked
from moec.codegen.destinations import in_destinations
from moec.codegen.object_cache import (
    compiled_objects,
    contents_of,
    llvm_module,
    missing_objects,
    named_by_content,
)
from moec.runtime.device.library import open_kernels
from moec.runtime.process.temporary import temporary_folder
from moec.target.cpu import CpuTarget


@dataclass(frozen=True)
class Objects:
    """Object files compiled for `target`, one per kernel, and the module whose library they become
    part of: an executable that calls them, or an empty module."""

    kernels: tuple[bytes, ...]
    frame: Exportable
    target: CpuTarget

    def export_library(
        self,
        file_name: str,
        *,
        fcompile: Callable[[str, Sequence[str]], None],
        addons: list[str] | None = None,
    ) -> None:
        """The interface of TVM's modules: `fcompile` links object files into the library
        `file_name`."""
        with temporary_folder(sum(map(len, self.kernels))) as folder:
            paths = list(addons or ())
            for number, content in enumerate(self.kernels):
                path = folder / f"{number}.o"
                path.write_bytes(content)
                paths.append(str(path))
            self.frame.export_library(file_name, fcompile=fcompile, addons=paths)

    def __getitem__(self, name: str) -> Callable[..., None]:
        """The kernel of that name, ready to be called on this machine.

        Raises TargetError if there is no linker, and ArtifactError if the library cannot be loaded.
        """
        function: Callable[..., None] = self._opened[name]
        return function

    @cached_property
    def _opened(self) -> Any:
        return open_kernels(linked(self, self.target))


def compile_module(
    module: tvm.IRModule, target: CpuTarget, opt_level: int = 2, store: Store | None = None
) -> Objects:
    """The executable of a module from `lower`, and its kernels.

    `store` caches compiled kernels; None means the user's store.
    """
    options = options_of(target, opt_level)
    with context(), options:
        named, contents = named_by_content(lowered_calls(module))
        kernels, frame = executable(named, options)
        store = store or default_store()
        objects = compiled_objects(kernels, contents, options, store, checked=False)
    return Objects(tuple(objects.values()), frame, target)


def kernels_to_compile(
    module: tvm.IRModule, target: CpuTarget, opt_level: int = 2, store: Store | None = None
) -> tuple[int, int]:
    """The number of kernels in a module from `lower`, and how many of them `compile_module` would
    compile because the store lacks them."""
    options = options_of(target, opt_level)
    with context(), options:
        _, contents = named_by_content(lowered_calls(module))
        missing = missing_objects(contents, options, store or default_store(), checked=False)
    return len(contents), missing


def executable(
    module: tvm.IRModule, options: tvm.target.Target
) -> tuple[dict[str, PrimFunc], relax.VMExecutable]:
    """For a module whose calls are lowered: its kernels by name, and the executable that calls them
    by name.

    Must be called in the PassContext in which the kernels are compiled.
    """
    builder = relax.ExecBuilder()
    module = _vmcodegen(builder, module)
    kernels = {v.name_hint: f for v, f in module.functions.items() if isinstance(f, PrimFunc)}
    frame = relax.VMExecutable(_ffi_api.VMLink(builder, options, _empty(options), [], {}))
    return kernels, frame


def compile_kernels(
    *kernels: PrimFunc,
    target: CpuTarget,
    opt_level: int = 2,
    checked: bool = False,
    store: Store | None = None,
) -> Objects:
    """Compiles kernels by their names, in the way of a module's kernels.

    If `checked`, kernels check the shapes of their arguments. For `store`, see `compile_module`.
    """
    named = {str(kernel.attrs["global_symbol"]): kernel for kernel in kernels}
    options = options_of(target, opt_level)
    with context(checked):
        store = store or default_store()
        objects = compiled_objects(named, contents_of(named), options, store, checked)
        return Objects(tuple(objects.values()), _empty(options), target)


def assembly(kernel: PrimFunc, target: CpuTarget) -> str:
    """The assembly text of a kernel for `target`."""
    options = options_of(target, 2)
    with context():
        built = llvm_module("kernel", kernel, options, checked=False)
    text: str = built.inspect_source("asm")
    return text


def _empty(options: tvm.target.Target) -> tvm.runtime.Module:
    return tvm.get_global_func("target.build.llvm")(tvm.IRModule({}), options)


def options_of(target: CpuTarget, opt_level: int) -> tvm.target.Target:
    """A target in TVM's form."""
    options = target.tvm()
    if opt_level == 0:
        options["opt-level"] = 0
    return tvm.target.Target(options)


def context(checked: bool = False) -> tvm.transform.PassContext:
    """TVM's options for compiling kernels. If `checked`, kernels check the shapes of their
    arguments; those of `main` are checked where tensors enter it.

    Buffers get the sizes that they need: a search for smaller ones would take most of the time.
    """
    return tvm.transform.PassContext(
        opt_level=3,
        config={"tirx.disable_assert": not checked},
        disabled_pass=["s_tir.CompactBufferAllocation"],
    )


def lowered_calls(module: tvm.IRModule) -> tvm.IRModule:
    """A module from `lower` with its memory planned. Every call is already a kernel call."""
    t = relax.transform
    calls = tvm.transform.Sequential(
        [
            t.DeadCodeElimination(),
            t.ToNonDataflow(),
            t.RemovePurityChecking(),
            t.CallTIRRewrite(),
        ]
    )
    memory = tvm.transform.Sequential(
        [
            t.StaticPlanBlockMemory(),
            t.LowerAllocTensor(),
            t.KillAfterLastUse(),
            t.LowerRuntimeBuiltin(),
            t.ComputePrimValue(),
            t.VMShapeLower(),
            t.AttachGlobalSymbol(),
        ]
    )
    return in_fixed_order(memory(in_destinations(calls(module))))


# Functions that compute sizes, in a fixed order.
#
# TVM collects the sizes of a program that follow from those of its inputs in functions, each of
# which stores them into an array, in the order of addresses in memory. So these functions would
# differ from process to process, and their object files would never be in the cache.
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
