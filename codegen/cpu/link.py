"""Links objects to a shared library with a C compiler, this machine's or a cross compiler.

Libraries for Linux carry the thread pool of pool.c, which `moec.runtime.process.pool` connects, the
store of experts on disk (`moec.runtime.expert_store`) of expert_store.c, and the
clock of timed.c, which runs in `moec profile` alone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

from moec.cache import OBJECTS, default_store, key_of, load, save
from moec.errors import TargetError
from moec.runtime.process.temporary import temporary_folder
from moec.target.cpu import CpuTarget

COMPILERS = ("cc", "gcc", "clang")
POOL, STORE, TIMED = (
    Path(__file__).parent / name for name in ("pool.c", "expert_store.c", "timed.c")
)
"""The sources that every library for Linux contains."""


class Exportable(Protocol):
    """A compiled module of TVM: kernels, or an executable. `addons` are further object files."""

    def export_library(
        self,
        file_name: str,
        *,
        fcompile: Callable[[str, Sequence[str]], None],
        addons: list[str] | None = None,
    ) -> None: ...


def linked(built: Exportable, target: CpuTarget) -> bytes:
    """The bytes of the shared library of a module that was compiled for `target`.

    Raises TargetError if no C compiler links for the target, or it fails.
    """
    command = linker_for(target)

    with temporary_folder(0) as folder:
        path = folder / "lib.so"

        def link(output: str, objects: Sequence[str]) -> None:
            words = ["-shared", "-fPIC", "-o", output, *objects]
            if sys.platform == "darwin":
                words += ["-undefined", "dynamic_lookup"]
            for source in (POOL, STORE, TIMED) if for_linux(target) else ():
                part = folder / f"{source.stem}.o"
                part.write_bytes(compiled_source(source, command, target))
                words.append(str(part))
            _run(command, words, target)

        built.export_library(str(path), fcompile=link)
        return path.read_bytes()


def for_linux(target: CpuTarget) -> bool:
    return "linux" in (target.mtriple or sys.platform)


@cache
def compiled_source(source: Path, command: tuple[str, ...], target: CpuTarget) -> bytes:
    """The object file of a source, from the user's cache if it is there."""
    words = ["-std=gnu11", "-O2", "-fPIC", "-c"]
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    machine = (platform.system(), platform.machine())
    key = key_of(source.read_bytes(), *command, version, *machine, *words)
    store = default_store()
    content = load(store, OBJECTS, key)
    if content is None:
        with temporary_folder(0) as folder:
            path = folder / "part.o"
            _run(command, [*words, str(source), "-o", str(path)], target)
            content = path.read_bytes()
        save(store, OBJECTS, {key: content})
    return content


def _run(command: Sequence[str], words: Sequence[str], target: CpuTarget) -> None:
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        message = (done.stderr or done.stdout).strip() or f"it ended with {done.returncode}"
        raise TargetError(f"{' '.join(command)} cannot link for {target.name!r}: {message}")


def linker_for(target: CpuTarget) -> tuple[str, ...]:
    """`linker` of this machine, for a target."""
    return linker(target.mtriple, os.environ, shutil.which)


def linker(
    triple: str, env: Mapping[str, str], which: Callable[[str], str | None]
) -> tuple[str, ...]:
    """The linker's command: for this machine $CC, or the first compiler found; for another machine,
    given by an LLVM `triple`, its GCC or zig.

    Raises TargetError if there is none, or $CC does not exist.
    """
    machine = triple.partition("-")[0]
    native = machine in ("", platform.machine())
    if native and (named := env.get("CC")):
        if which(named.split()[0]):
            return tuple(named.split())
        raise TargetError(f"CC names {named}, which is not installed: unset CC, or install it")
    for name in COMPILERS if native else (f"{triple}-gcc",):
        if path := which(name):
            return (path,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc", *(() if native else ("-target", triple)))
    if native:
        raise TargetError(
            "no C compiler to link with: install one of "
            f"{', '.join(COMPILERS)}, or `pip install ziglang`"
        )
    raise TargetError(
        f"no C compiler links for {machine}, and this machine is {platform.machine()}: install "
        f"gcc-{triple} (Debian's name for it), or `pip install ziglang`"
    )
