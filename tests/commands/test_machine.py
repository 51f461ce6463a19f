"""moec doctor: its inputs, its output, and its exit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moec.codegen.cpu import link
from moec.commands import machine
from moec.commands.machine import BAD, NOTE, OK, Check
from moec.target import cpu
from tests.command_line import invoke

run = partial(invoke, "doctor")


def test_this_machine_can_work() -> None:
    result = run("--json")
    report = json.loads(result.stdout)
    assert report["ok"], [check for check in report["checks"] if check["state"] == BAD]
    assert result.exit_code == 0
    names = [check["name"] for check in report["checks"]]
    for name in (
        "python",
        "cpu",
        "features",
        "target",
        "torch",
        "capture",
        "apache-tvm",
        "linker",
        "memory",
        "[gguf]",
        "[sign]",
    ):
        assert name in names
    for check in report["checks"]:
        assert check["state"] == OK or check["mend"], check


def test_what_an_extra_lacks() -> None:
    check = machine.check_extra("sign", ["moec", "numpy", "no-such-package"])
    assert check.says == "without no-such-package; needed for moec sign and --signed-by"
    assert (check.state, check.mend) == (NOTE, "pip install 'moec[sign]'")


def test_something_missing_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        Check("torch", OK, "2.13"),
        Check("huge pages", NOTE, "never", "turn them on"),
        Check("linker", BAD, "no C compiler", "install g++"),
    ]
    monkeypatch.setattr(machine, "examine", lambda: checks)
    result = run()
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "✓ torch       2.13",
        "! huge pages  never",
        "              -> turn them on",
        "✗ linker      no C compiler",
        "              -> install g++",
        "moec cannot run on this machine: fix linker",
    ]


def test_a_note_alone_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "examine", lambda: [Check("memory", NOTE, "1 GB", "get more")])
    result = run()
    assert result.exit_code == 0
    assert result.stdout.endswith("moec can run on this machine\n")


def test_linker_found_named_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def which(*there: str) -> Any:
        return lambda name: f"/bin/{name}" if name in there else None

    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(link.platform, "machine", lambda: "x86_64")
    assert machine.linker({}, which("clang")).says == "/bin/clang"
    assert machine.linker({"CC": "icx -v"}, which("icx", "cc")).says == "icx -v"
    other = "aarch64-linux-gnu"
    both = machine.linker({}, which("cc", f"{other}-gcc"))
    assert both.says == f"/bin/cc; for {other} /bin/{other}-gcc"
    named = machine.linker({"CC": "icx"}, which("cc"))
    assert (named.state, named.says) == (BAD, "CC names icx, which is not installed")
    assert named.mend == "unset CC, or install it"
    missing = machine.linker({}, which())
    assert (missing.state, missing.says) == (BAD, "no C compiler to link with")
    assert missing.mend == "install one of cc, gcc, clang, or `pip install ziglang`"


@pytest.mark.parametrize(
    ("value", "state", "words"),
    [
        ("", OK, "not set: artifacts take the default"),
        ("1", OK, "artifacts take 1"),
        ("many", BAD, "'many' is not a number"),
        ("0", BAD, "'0' is not a number"),
        ("100000", NOTE, "100000, more than the"),
    ],
)
def test_threads(value: str, state: str, words: str) -> None:
    check = machine.threads({"TVM_NUM_THREADS": value})[0]
    assert check.state == state
    assert words in check.says
    assert (state == OK) == (check.mend == "")


def test_memory_of_the_machine_and_of_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 8000000 kB\n")
    assert machine.memory(meminfo, tmp_path).says == "8.2 GB free of 16.4 GB"
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "memory.current").write_text("500000000\n")
    small = machine.memory(meminfo, tmp_path)
    assert small.says == "1.5 GB free of 2.0 GB (limit of the container)"
    assert small.state == NOTE
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(meminfo, tmp_path).state == OK
    assert machine.memory(tmp_path / "none", tmp_path).state == NOTE


def test_huge_pages(tmp_path: Path) -> None:
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    assert machine.huge_pages(enabled) == Check("huge pages", OK, "madvise")
    enabled.write_text("always madvise [never]\n")
    assert machine.huge_pages(enabled).state == NOTE
    assert machine.huge_pages(tmp_path / "none").state == OK


def test_processor_with_two_threads_a_core(tmp_path: Path) -> None:
    block = "model name\t: A CPU\nphysical id\t: 0\ncore id\t\t: {}\n\n"
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(block.format(core) for core in (0, 0, 1, 1)))
    says = machine.processor(cpuinfo)[0].says
    assert says.startswith("A CPU; ")
    assert says.endswith(", 2 cores")


def test_a_weak_cpu_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "host", lambda: cpu.TARGETS["avx2"])
    monkeypatch.setattr(cpu, "missing", lambda t, available=None: ("avx512f",))
    says = machine.chosen_target().says
    assert says.startswith("avx2: 8 float lanes (avx2-vnni needs avx512f; avx512 needs avx512f")


def test_packages_missing_old_and_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.specifiers import SpecifierSet

    monkeypatch.setattr(machine, "installed_version", {"torch": "2.1", "apache-tvm": "0.27.0"}.get)
    old = machine.check_package("torch", SpecifierSet(">=2.12"), "", {})
    assert (old.state, old.says) == (BAD, "2.1, but moec needs >=2.12")
    assert old.mend == "pip install 'torch>=2.12'"
    broken = machine.check_package(
        "apache-tvm", SpecifierSet(">=0.27"), "", {"apache-tvm": "no LLVM"}
    )
    assert (broken.state, broken.says) == (BAD, "0.27.0 fails to load: no LLVM")
    absent = machine.check_package("transformers", SpecifierSet(""), "hf", {})
    assert absent.state == NOTE
    assert absent.says == "not installed (needed for Hugging Face checkpoints only)"
    assert absent.mend == "pip install 'moec[hf]'"


def test_a_torch_that_capture_does_not_know_is_a_note() -> None:
    check = machine.capture({"capture": "moec does not know torch 9.0 (a reason): modules ..."})
    assert (check.state, check.says[:30]) == (NOTE, "moec does not know torch 9.0 (")
    assert check.mend.endswith("a version of torch that is tested")
    assert machine.capture({}).state == OK


def test_packages_are_probed_alone_only_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each imports, others import too: all in one process take half the time."""
    calls: list[list[str]] = []

    def probe(programs: Mapping[str, str]) -> dict[str, str]:
        calls.append([*programs])
        return {"all": "fails", "numba": "is broken"} if fails else {}

    monkeypatch.setattr(machine, "probe", probe)
    for fails, expected in ((False, 1), (True, 2)):
        calls.clear()
        states = {check.name: check.state for check in machine.packages()}
        assert len(calls) == expected
        assert calls[0] == ["all"]
        assert (states["numba"] == machine.OK) != fails


def test_probes_survive_a_crash_and_a_hang() -> None:
    faults = machine.probe(
        {
            "good": "pass",
            "bad": "raise ImportError('libfoo.so')",
            "crash": "import os; os.abort()",
            "hang": "import time; time.sleep(60)",
        },
        seconds=1.5,
    )
    assert faults == {
        "bad": "ImportError: libfoo.so",
        "crash": "ended with signal 6",
        "hang": "nothing after 2 s",
    }
