"""Replay shows changed passes and kernels, and ignores changes of only places and names."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moec.target.cpu import TARGETS
from tests.replay.__main__ import main
from tests.replay.compare import LINES, compare, report
from tests.replay.plugin import stable
from tests.replay.records import FORMAT, Folder, Owner, Record

ROOT = Path(__file__).resolve().parents[2]


def folder(path: Path, *owners: tuple[str, dict[str, str]], shared: bool = False) -> Folder:
    """(key, {"kind name": text}) of each owner."""
    written = Folder(path)
    for key, texts in owners:
        records = (
            Record(*name.split(), written.add_text(text))  # type: ignore[call-arg]
            for name, text in texts.items()
        )
        written.add_owner(Owner(key, shared, tuple(records)), "main")
    return written


def lines(before: Folder, after: Folder) -> str:
    return "\n".join(report(compare(before, after), before, after))


def test_a_changed_text_is_shown_once(tmp_path):
    before = folder(
        tmp_path / "a",
        ("test_gate", {"kernel gate": "a\nb\nc\n", "graph fuse": "g"}),
        ("test_gate[2]", {"kernel gate": "a\nb\nc\nd\n"}),
    )
    after = folder(
        tmp_path / "b",
        ("test_gate[2]", {"kernel gate": "a\nB\nc\nd\n"}),
        ("test_gate", {"kernel gate": "a\nB\nc\n", "graph fuse": "g"}),
    )
    text = lines(before, after)
    assert text.count("kernel gate of test_gate, and 1 more that differ alike:") == 1
    assert text.count("--- base") == 1
    assert "\n-b\n+B\n" in text
    assert "graph" not in text
    assert text.endswith("replay: 2 differences in 2 tests")


def test_records_come_and_go(tmp_path):
    before = folder(tmp_path / "a", ("test_x", {"graph fuse": "g", "kernel one": "1"}))
    after = folder(tmp_path / "b", ("test_x", {"graph fuse": "g", "kernel two": "2"}))
    text = lines(before, after)
    assert "kernel one of test_x\n--- base\n+++ this commit\n@@ -1 +0,0 @@\n-1" in text
    assert "kernel two of test_x\n--- base\n+++ this commit\n@@ -0,0 +1 @@\n+2" in text


def test_order_processes_and_new_names_are_no_difference(tmp_path):
    gate, norm = {"kernel gate": "g"}, {"kernel norm": "n"}
    before = folder(tmp_path / "a", ("test_text", gate), ("test_text", norm), ("test_old", gate))
    folder(tmp_path / "a", ("fixture model", norm), shared=True)
    after = folder(tmp_path / "b", ("test_text", norm), ("test_new", gate), ("test_text", gate))
    folder(tmp_path / "b", ("fixture model", norm), ("fixture model", norm), shared=True)
    assert lines(before, after) == "replay: no difference in 2 graphs, programs and kernels"


def test_one_of_two_tests_of_a_name_changes(tmp_path):
    before = folder(
        tmp_path / "a", ("test_text", {"graph f": "1"}), ("test_text", {"graph f": "2"})
    )
    after = folder(tmp_path / "b", ("test_text", {"graph f": "3"}), ("test_text", {"graph f": "1"}))
    text = lines(before, after)
    assert "-2\n+3" in text
    assert "1 differences in 1 tests" in text


def test_what_one_run_alone_has_is_named(tmp_path):
    before = folder(tmp_path / "a", ("test_x", {"graph f": "1"}), ("test_lost", {"graph f": "2"}))
    new = [(f"test_{n}", {"graph f": str(n)}) for n in range(3, 10)]
    after = folder(tmp_path / "b", ("test_x", {"graph f": "1"}), *new)
    assert lines(before, after).splitlines() == [
        "only at base, compared with nothing: test_lost",
        "only at this commit, compared with nothing: "
        "test_3, test_4, test_5, test_6, test_7 and 2 more",
        "replay: no difference in 8 graphs, programs and kernels",
    ]


def test_long_differences_are_cut(tmp_path):
    before = folder(tmp_path / "a", ("test_x", {"graph f": "a\n" * 100}))
    after = folder(tmp_path / "b", ("test_x", {"graph f": "b\n" * 100}))
    assert f"... {203 - LINES} lines more" in lines(before, after)


def test_nothing_recorded_is_not_equality(tmp_path):
    full = folder(tmp_path / "a", ("test_x", {"graph f": "1"}))
    with pytest.raises(ValueError, match="the run of this commit recorded nothing"):
        compare(full, Folder(tmp_path / "none"))


def test_records_of_another_format(tmp_path):
    (tmp_path / "owners-main.jsonl").write_text('[99, "test_x", false, []]\n')
    with pytest.raises(ValueError, match=f"records have format 99, this reads {FORMAT}"):
        list(Folder(tmp_path).owners())


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


def test_a_suite_is_recorded(tmp_path):
    """In a process of its own: pytest within pytest shares modules and plugins."""
    folders = []
    for name, op, number in (("a", "relu", 1), ("b", "tanh", 7)):
        folders.append(Folder(tmp_path / name))
        folders[-1].path.mkdir()
        text = textwrap.dedent(SUITE).format(op=op, number=number)
        (tmp_path / name / "suite.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *(str(f.path) for f in folders)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = folders
    names = {owner.key: [r[:2] for r in owner.records] for owner in before.owners()}
    assert names == {
        "fixture program": [("graph", "capture"), ("graph", "canonicalise")],
        "cached kernel": [("kernel", "fill"), ("llvm", "fill")],
        "test_module": [
            ("program", "main"),
            ("kernel", "fused_relu"),
            ("llvm", "fused_relu"),
        ],
    }
    kernels = [o.records[0].digest for o in before.owners() if o.key == "cached kernel"]
    texts = [before.text(digest) for digest in kernels]
    assert len(texts) == 3, "one example is generated, the simplest"
    assert ["1.0" in texts[0], "90.0" in texts[1], "0.0" in texts[2]] == [True] * 3
    assert all(f'"mcpu":"{TARGETS["avx2"].tvm()["mcpu"]}"' in text for text in texts)
    text = lines(before, after)
    assert "aten.relu" in text
    assert "aten.tanh" in text
    assert "7.0" in text
    assert "90.0" not in text
    [module] = [owner for owner in after.owners() if owner.key == "test_module"]
    assert "@moec_tanh_f32(" in after.text(module.records[2].digest)


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
