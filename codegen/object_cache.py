"""Compiles kernels to object files, one each, and caches them.

The key is a hash of everything that the machine code depends on:

    the kernel before TVM's passes: its text, the strings in it (LLVM functions that it imports,
        which TVM's text leaves out), and TVM's own structural hash
    the target with its options, whether the arguments are checked, and the machine if the
        target does not fix it
    the versions of TVM and LLVM, and the source of moec that is used from here on

so a hit saves TVM's passes as well as LLVM. Kernels do not call each other, so each can be a
separate module. An LLVM function that two of them define is equal in both, and the linker keeps
one.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import GlobalVar, StringImm
from tvm.tirx import PrimFunc
from tvm_ffi.structural import structural_map, structural_walk

from moec.cache import OBJECTS, Store, contains, key_of, load, save
from moec.codegen.cpu.pipeline import PIPELINE
from moec.errors import IRError
from moec.runtime.process.temporary import temporary_folder
from moec.runtime.process.threads import available

LOGGER = logging.getLogger(__name__)
_SOURCES = ("build.py", "object_cache.py", "cpu/opaque.py", "cpu/pipeline.py")
_CONTENT = 16  # digits of the content hash in a kernel's name


def compiled_objects(
    kernels: Mapping[str, PrimFunc],
    contents: Mapping[str, str],
    target: tvm.target.Target,
    store: Store,
    checked: bool,
) -> dict[str, bytes]:
    """The object file of each kernel, which defines it under its name. `contents` has the hash of
    each kernel's content.

    Must be called in the PassContext in which the kernels are compiled. Raises IRError if a kernel
    calls an undefined function of moec.
    """
    keys = {name: _key(name, contents[name], target, checked) for name in kernels}
    objects = {}
    for name, key in keys.items():
        content = load(store, OBJECTS, key)
        if content is not None:
            objects[name] = content
    missing = {name: kernel for name, kernel in kernels.items() if name not in objects}
    LOGGER.info("%d kernels, %d of them not in the cache", len(kernels), len(missing))
    compiled = machine_code(missing, target, checked)
    save(store, OBJECTS, {keys[name]: content for name, content in compiled.items()})
    return objects | compiled


def missing_objects(
    contents: Mapping[str, str], target: tvm.target.Target, store: Store, checked: bool
) -> int:
    """How many kernels `compiled_objects` would compile, of those with these contents."""
    keys = (_key(name, content, target, checked) for name, content in contents.items())
    return sum(not contains(store, OBJECTS, key) for key in keys)


def machine_code(
    kernels: Mapping[str, PrimFunc], target: tvm.target.Target, checked: bool
) -> dict[str, bytes]:
    """The object file of each kernel, made by as many threads as there are cores: TVM releases
    Python's lock. A PassContext belongs to a thread, so each thread enters it.

    Progress records have the number of finished kernels (`detail`) and their `share`. Raises the
    exception of the first kernel that failed, after all others are done.
    """
    context = tvm.transform.PassContext.current()

    def compile_kernel(item: tuple[str, PrimFunc]) -> bytes:
        with context:
            return _emit(llvm_module(*item, target, checked))

    objects: dict[str, bytes] = {}
    with ThreadPoolExecutor(available()) as pool:
        for name, content in zip(kernels, pool.map(compile_kernel, kernels.items()), strict=True):
            objects[name] = content
            count, share = f"{len(objects)}/{len(kernels)}", len(objects) / len(kernels)
            LOGGER.debug("kernels %s", count, extra={"detail": count, "share": share})
    return objects


def llvm_module(
    name: str, kernel: PrimFunc, target: tvm.target.Target, checked: bool
) -> tvm.runtime.Module:
    """The LLVM module of a kernel, which LLVM has optimised."""
    module = tirx.transform.BindTarget(target.with_host(target))(tvm.IRModule({name: kernel}))
    passes, finish, _ = tirx.get_tir_pipeline(PIPELINE)
    module = finish()(passes(module))
    if not checked:
        module = tirx.transform.SkipAssert()(module)
    return tvm.get_global_func("target.build.llvm")(module, target)


def named_by_content(module: tvm.IRModule) -> tuple[tvm.IRModule, dict[str, str]]:
    """A module in which kernels are named by their content, and equal ones are merged; and the hash
    of each kernel's content, by its name.

    So a kernel has the same object file whatever else its model contains. The hash is of the kernel
    without the digits of its name, which follow from the hash.
    """
    names: dict[str, GlobalVar] = {}
    contents: dict[str, str] = {}
    shared: dict[str, GlobalVar] = {}
    functions: dict[GlobalVar, object] = {}
    for var, function in module.functions.items():
        if isinstance(function, PrimFunc):
            base = re.sub(r"_?\d+$", "", var.name_hint)
            plain = function.with_attr("global_symbol", base)
            content = _content(plain)
            name = f"{base}_{content[:_CONTENT]}"
            contents[name] = content
            names[var.name_hint] = shared.setdefault(name, GlobalVar(name))
            functions[shared[name]] = function.with_attr("global_symbol", name)

    def renamed(var: GlobalVar) -> GlobalVar:
        return names.get(var.name_hint, var)

    for var, function in module.functions.items():
        if not isinstance(function, PrimFunc):
            functions[var] = structural_map(function, (GlobalVar, renamed))
    return tvm.IRModule(functions, attrs=module.attrs), contents


def _key(name: str, content: str, target: tvm.target.Target, checked: bool) -> str:
    return key_of(name, content, target, checked, *compiler_key())


def contents_of(kernels: Mapping[str, PrimFunc]) -> dict[str, str]:
    """The hash of each kernel's content."""
    return {name: _content(kernel) for name, kernel in kernels.items()}


def _content(kernel: PrimFunc) -> str:
    """A hash of a kernel as text, and of TVM's 64-bit hash, which covers what the text may leave
    out. Printing the text takes longer than all else that a kernel from the cache needs, so it is
    done once for each kernel."""
    strings: list[str] = []
    structural_walk(kernel.body, (StringImm, lambda string: strings.append(string.value)))
    numbers: dict[str, str] = {}  # TVM numbers the sizes of shapes by their addresses in memory
    text = re.sub(
        r"\bv(_\d+)?\b",
        lambda name: numbers.setdefault(name[0], f"v_{len(numbers)}"),
        kernel.script().rpartition("@T.prim_func")[2],
    )
    return key_of(text, tvm_ffi.structural_hash(kernel), *strings)


@cache
def compiler_key() -> tuple[object, ...]:
    """Everything but the target that the machine code of a kernel depends on."""
    folder = Path(__file__).parent
    sources = hashlib.sha256(b"\0".join((folder / name).read_bytes() for name in _SOURCES))
    llvm = tvm.get_global_func("target.llvm_version_major")()
    machine = (platform.system(), platform.machine())
    return (version("apache-tvm"), llvm, *machine, sources.hexdigest())


def _emit(built: tvm.runtime.Module) -> bytes:
    text = built.inspect_source("ll")
    check_defined(text)
    # The text is an upper bound of the code's size; other threads write files at the same time.
    with temporary_folder(len(text) * available()) as folder:
        path = folder / "kernel.o"
        built.write_to_file(str(path))
        return path.read_bytes()


def check_defined(text: str) -> None:
    """Raises IRError if LLVM text declares a function of moec without defining it: loading a
    library with such a call would end the process."""
    missing = sorted(set(re.findall(r"^declare .*@(moec_\w+)", text, re.MULTILINE)))
    if missing:
        raise IRError(f"kernels call {', '.join(missing)}, which nothing defines")
