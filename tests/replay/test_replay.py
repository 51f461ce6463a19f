"""Replay shows changed passes and kernels, and ignores changes of only places and names."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moec.target.cpu import TARGETS
from tests.replay.__main__ import ReplayError, compare, main
from tests.replay.plugin import file_name, stable

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)


def test_what_changed_is_shown_and_what_moved_is_not(tmp_path, capsys):
    gate = "== kernel gate\n" + "\n".join("abcdefgh")
    write(tmp_path / "base", {"test_a.py/test_gate.txt": gate, "test_a.py/test_x.txt": "x"})
    write(tmp_path / "here", {"test_b.py/test_gate.txt": gate, "test_a.py/test_x.txt": "x"})
    assert compare(tmp_path) == 0
    assert "replay: 0 differences in 2 tests" in capsys.readouterr().out
    write(tmp_path / "here", {"test_b.py/test_gate.txt": gate.replace("c", "C")})
    assert compare(tmp_path) == 1
    text = capsys.readouterr().out
    assert "\n-c\n+C\n" in text
    assert text.endswith("replay: 1 differences in 2 tests and what they share\n")
    (tmp_path / "here" / "test_a.py" / "test_x.txt").unlink()
    assert compare(tmp_path) == 1, "a test that is gone"


def test_nothing_recorded_is_not_equality(tmp_path):
    write(tmp_path / "base", {"test_a.py/test_x.txt": "x"})
    with pytest.raises(ReplayError, match="nothing is compared: 1 and 0 records"):
        compare(tmp_path)


@pytest.mark.parametrize("owner", ["a.py::t[x/y]", "a.py::t[" + "z" * 300 + "]", "fixture/model"])
def test_names_of_files(owner):
    name = file_name(owner, "text")
    assert len(Path(name).name) < 200
    assert name != file_name(owner, "other"), "what is shared has a file for each text"
    assert file_name(owner, "") != file_name(owner[:-1] + "+", "")


SUITE = """
    from functools import cache

    import pytest
    from hypothesis import example, given, settings, strategies as st
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    from moec.codegen.backends.cpu.backend import CPU
    from moec.codegen.build import compile_kernels, compile_module
    from moec.codegen.lower import lower
    from moec.ir.graph import Module, Program
    from moec.passes.simplify.canonicalise import Canonicalise
    from moec.passes.core.runner import run
    from moec.target.cpu import TARGETS
    from moec.ir.text import parse

    TEXT = '''graph main(x: f32[4]) {{
      y: f32[4] = aten.{op}.default(x)
      return y
    }}'''

    @cache
    def kernel(number):
        with IRBuilder() as builder, T.prim_func():
            T.func_name("fill")
            y = T.match_buffer(T.arg("y", T.handle()), (4,), "float32")
            T.buffer_store(y, T.float32(number), [0])
        return compile_kernels(builder.get(), target=TARGETS["avx2"])

    @pytest.fixture(scope="module")
    def program():
        return run(Program(parse(TEXT), {{}}), [Canonicalise()])[-1].program

    class TestOne:
        def test_kernel(self):
            kernel({number})

    @settings(max_examples=50)
    @example(90)
    @given(st.integers(0, 80))
    def test_example(number):
        kernel(number)

    def test_program(program):
        pass

    def test_module():
        target = TARGETS["avx2"]
        program = Module.of(Program(parse(TEXT), {{}}))
        compile_module(lower(program, target, CPU).module, target)
"""


RUN = """
import sys, pytest

for folder in sys.argv[1:]:
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["-p", "tests.replay.plugin"]
    assert pytest.main([*options, f"--replay={folder}", f"{folder}/suite.py"]) == 0
"""


def test_a_suite_is_recorded(tmp_path, capsys):
    """In a process of its own: pytest within pytest shares modules and plugins."""
    folders = [tmp_path / "base", tmp_path / "here"]
    for folder, op, number in zip(folders, ("relu", "tanh"), (1, 7), strict=True):
        folder.mkdir()
        (folder / "suite.py").write_text(textwrap.dedent(SUITE).format(op=op, number=number))
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, folders)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    texts = {
        str(file.relative_to(folders[0])): file.read_text() for file in folders[0].rglob("*.txt")
    }
    headers = {
        name: [line[3:] for line in text.splitlines() if line.startswith("== ")]
        for name, text in texts.items()
    }
    kernels = sorted(text for name, text in texts.items() if name.startswith("cached/kernel"))
    assert len(kernels) == 3, "one example is generated, the simplest"
    for number in ("1.0", "90.0", "0.0"):
        assert any(f"T.float32({number})" in text for text in kernels)
    assert all(f'"mcpu":"{TARGETS["avx2"].tvm()["mcpu"]}"' in text for text in kernels)
    assert sorted(map(tuple, headers.values())) == [
        ("graph canonicalise", "graph capture"),
        *[("kernel fill", "llvm fill")] * 3,
        ("kernel fused_relu", "llvm fused_relu", "program main"),
    ]
    assert compare(tmp_path) == 1
    text = capsys.readouterr().out
    assert "aten.relu" in text
    assert "aten.tanh" in text
    assert "7.0" in text
    assert "90.0" not in text
    assert "@moec_tanh_f32(" in text


def test_names_hold_no_content():
    text = "call gate_0123456789abcdef in: %0\ncall f_2 in: %1"
    assert stable("main", text) == "call gate in: %0\ncall f_2 in: %1"


def test_statements_of_shape_functions_have_no_order():
    assert stable("shape_func1", "H[2] = 4\nH[1] = 3") == stable(
        "shape_func1", "H[1] = 3\nH[2] = 4"
    )
    assert stable("gate", "b\na") == "b\na"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit, which has no tests/replay."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "--quiet", str(tmp_path)], check=True)
    commit = [*git, "-C", str(tmp_path), "commit", "--quiet", "--allow-empty", "-m", "first"]
    subprocess.run(commit, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("HEAD", "replay: HEAD has no tests/replay: it is older than replay is"),
        ("HEAD~7", "replay: cannot check out HEAD~7: fatal: invalid reference: HEAD~7"),
    ],
)
def test_bases_that_cannot_record(repository, capfd, base, message):
    assert main(["--base", base]) == 2
    assert message in capfd.readouterr().err
    listed = subprocess.check_output(["git", "worktree", "list"], text=True)
    assert len(listed.splitlines()) == 1
