"""The choice of the compiler that links: this machine's, or a cross compiler for the target."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.codegen.build import compile_kernels
from moec.codegen.cpu import link
from moec.codegen.cpu.gemm.linear import grouped_linear
from moec.codegen.specs.products import LinearSpec
from moec.errors import TargetError
from moec.target.cpu import TARGETS, host

ARM = TARGETS["neon-dotprod"].mtriple
ZIG = (sys.executable, "-m", "ziglang", "cc")
MACHINE = 18  # where an ELF file names it: 2 bytes
AARCH64 = 183


def which(*there: str) -> Callable[[str], str | None]:
    return lambda name: f"/bin/{name}" if name in there else None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def is_(name: str, zig: bool = False) -> None:
        monkeypatch.setattr(link.platform, "machine", lambda: name)
        monkeypatch.setattr(link.importlib.util, "find_spec", lambda _: zig or None)

    return is_


def test_this_machine_is_linked_for_by_its_compiler(machine):
    machine("x86_64")
    assert link.linker("", {}, which("gcc", "clang")) == ("/bin/gcc",)
    assert link.linker("x86_64-linux-gnu", {}, which("clang")) == ("/bin/clang",)
    assert link.linker("", {"CC": "ccache icx"}, which("ccache", "cc")) == ("ccache", "icx")
    machine("aarch64")
    assert link.linker(ARM, {}, which("cc")) == ("/bin/cc",)


def test_another_machine_needs_a_compiler_for_it(machine):
    machine("x86_64")
    assert link.linker(ARM, {"CC": "icx"}, which("icx", f"{ARM}-gcc")) == (f"/bin/{ARM}-gcc",)
    words = f"links for aarch64, and this machine is x86_64: install gcc-{ARM} .*ziglang"
    with pytest.raises(TargetError, match=words):
        link.linker(ARM, {"CC": "icx"}, which("icx", "cc"))


def test_zig_links_for_all(machine):
    machine("x86_64", zig=True)
    assert link.linker("", {}, which()) == ZIG
    assert link.linker(ARM, {}, which("cc")) == (*ZIG, "-target", ARM)


def test_no_compiler_and_one_that_is_not_there(machine):
    machine("x86_64")
    with pytest.raises(TargetError, match="install one of cc, gcc, clang, or `pip install ziglang"):
        link.linker("", {}, which())
    with pytest.raises(TargetError, match="CC names icx, which is not installed: unset CC"):
        link.linker("", {"CC": "icx"}, which("cc"))


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    built = compile_kernels(grouped_linear(host(), LinearSpec(8, 8, "float32")), target=host())
    with pytest.raises(TargetError, match=r"broken cannot link for .*: no space left"):
        link.linked(built, host())


def test_sources_are_compiled_once_for_each_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """In the user's cache: the object files are those of a first compilation."""
    log = tmp_path / "log"
    script = tmp_path / "cc"
    script.write_text(f'#!/bin/sh\necho "$1" >>{log}\nexec cc "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    source, command = link.TIMED, (str(script),)

    def compiled() -> bytes:
        link.compiled_source.cache_clear()  # as in another process
        return link.compiled_source(source, command, host())

    first = compiled()
    assert compiled() == first
    commands = log.read_text().split()
    assert commands.count("-std=gnu11") == 1
    assert commands.count("--version") == 2
    monkeypatch.setenv("MOEC_CACHE", "off")
    assert compiled() == first
    link.compiled_source.cache_clear()


@pytest.mark.skipif(
    not (shutil.which(f"{ARM}-gcc") or link.importlib.util.find_spec("ziglang")),
    reason=f"no C compiler here links for {ARM}",
)
def test_a_library_for_aarch64_is_one():
    target = TARGETS["neon-dotprod"]
    built = compile_kernels(grouped_linear(target, LinearSpec(8, 8, "float32")), target=target)
    result = link.linked(built, target)
    assert result.startswith(b"\x7fELF")
    assert int.from_bytes(result[MACHINE : MACHINE + 2], "little") == AARCH64
