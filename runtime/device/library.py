"""Loads TVM's runtime without its compiler, and opens native code with it.

Only `tvm_ffi` and two small libraries are loaded: importing `tvm` would read 260 MB and take a
second. `tvm_ffi` imports torch if it is installed, which takes another second; so that import is
blocked, unless the process has imported torch already.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from moec.errors import ArtifactError
from moec.runtime.process.pool import share_pool
from moec.runtime.process.temporary import temporary_folder
from moec.runtime.process.threads import set_threads
from moec.runtime.sizes import counts, indices
from moec.runtime.sizes import expressions as sizes

CPU, CUDA = 1, 2  # DLPack's device types
Around: TypeAlias = Callable[[Any], AbstractContextManager[None]]
"""(module of a library) -> a context."""
_POOLED = 2  # freed memory is kept for the next call


@cache
def tvm_ffi() -> ModuleType:
    """The module `tvm_ffi`, with TVM's runtime loaded into the process."""
    set_threads()
    keep_out = "torch" not in sys.modules
    if keep_out:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` fail
    try:
        import tvm_ffi as ffi
    finally:
        if keep_out:
            del sys.modules["torch"]
    if "tvm" not in sys.modules:
        tvm_spec = importlib.util.find_spec("tvm")
        if tvm_spec is None or not tvm_spec.submodule_search_locations:
            raise ArtifactError("TVM's runtime is missing; install apache-tvm")
        folder = Path(tvm_spec.submodule_search_locations[0]) / "lib"
        # Global: compiled code finds the thread pool by its symbol, and crashes without it.
        ctypes.CDLL(str(folder / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libtvm_runtime_extra.so"), ctypes.RTLD_LOCAL)  # sort, for topk
    ffi.register_global_func(counts.NAME, counts.require_count, override=True)
    ffi.register_global_func(indices.NAME, indices.require_index, override=True)
    ffi.register_global_func(
        sizes.NAME,
        lambda values, size, names: ffi.Shape((sizes.value_of_size(size, names, tuple(values)),)),
        override=True,
    )
    module: ModuleType = ffi
    return module


def open_library(
    library: Path | bytes,
    names: Iterable[str],
    kernels: Callable[[Any], object] | None = None,
    device: tuple[int, int] = (CPU, 0),
    around: Around = lambda module: nullcontext(),
) -> dict[str, Any]:
    """The functions of a compiled model, by name.

    `kernels` imports the GPU kernels that the library launches into the module that it is given;
    they run on `device`, DLPack's device type and index. `around` is the context in which the
    virtual machine looks up its kernels. Raises ArtifactError where the library
    does not load, or lacks one of the functions.
    """
    if not library:
        raise ArtifactError("the artifact has no native code: run it with --rebuild")
    opened = partial(_functions, names=tuple(names), kernels=kernels, device=device, around=around)
    functions: dict[str, Any] = _from_path(library, opened)
    return functions


def open_kernels(library: Path | bytes) -> Any:
    """The kernels of a library that holds nothing else, by name.

    Raises ArtifactError where it does not load.
    """
    return _from_path(library, _kernels)


def _from_path(library: Path | bytes, opened: Callable[[Path], Any]) -> Any:
    """Open a library. Bytes are written to a private temporary file, which is then removed."""
    if isinstance(library, Path):
        return opened(library)
    with temporary_folder(len(library)) as folder:
        path = folder / "lib.so"
        path.write_bytes(library)
        return opened(path)


def _module(path: Path) -> Any:
    try:
        # Unloaded with its last function. If it were kept alive, each load would stay mapped.
        return tvm_ffi().load_module(str(path), keep_module_alive=False)
    except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(error) from error


def _kernels(path: Path) -> Any:
    module = _module(path)
    share_pool(module, path)
    return module


def _functions(
    path: Path,
    names: Sequence[str],
    kernels: Callable[[Any], object] | None,
    device: tuple[int, int],
    around: Around,
) -> dict[str, Any]:
    module = _module(path)
    share_pool(module.imports[0], path)
    if kernels is not None:
        kernels(module.imports[0])  # the code; the module itself is the executable of the VM
    try:
        with around(module):
            vm = module["vm_load_executable"]()
            # The last device is the one that computes sizes.
            devices = (device,) if device[0] == CPU else (device, (CPU, 0))
            vm["vm_initialization"](*(n for pair in devices for n in (*pair, _POOLED)))
        return {name: vm[name] for name in names}
    except (RuntimeError, AttributeError, ValueError, OSError, TypeError) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> ArtifactError:
    line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if "failed to map segment" in line:
        return ArtifactError("the native code needs more memory than this process may have")
    return ArtifactError(f"the native code fails to load: {line}; compile the model again")
