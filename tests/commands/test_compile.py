"""moec compile: the options that reach the compiler, the output, and the exit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from moec.errors import CaptureError, VerificationError
from moec.report.report import Report
from tests.command_line import invoke
from tests.commands import models
from tests.commands.conftest import FakeCompiler

run = partial(invoke, "compile", "model")


def test_writes_the_artifact_and_reports(
    compiler: FakeCompiler, tmp_path: Path, golden: Callable[[str], None]
) -> None:
    out = tmp_path / "out.moec"
    result = run("-o", out)
    assert result.exit_code == 0
    assert out.read_text() == "artifact"
    assert result.stdout.endswith(f"\nwrote {out}\n")
    golden(result.stdout.replace(str(out), "out.moec"))
    full = run("-o", out, "--force", "--report").stdout
    assert full == f"{models.report()}wrote {out}\n"
    phases = [line.split("] ")[1] for line in result.stderr.splitlines()]
    assert phases == ["start", "capture", "passes", "kernels", "verify", "save", "done"]


def test_options_reach_the_compiler(compiler: FakeCompiler, tmp_path: Path) -> None:
    calib = tmp_path / "text.txt"
    calib.write_text("text")
    result = run(
        "-o", tmp_path / "out.moec", "--target", "avx2", "--dtype", "bf16", "-O", "1",
        "--passes", "+join-linears,-fuse-gate", "--verify", "1e-3", "--shapes", "ids=T[1..64]",
        "--calib", calib, "--budget", "kl<=0.1", "--strict", "--quant", "int4:64",
        "--keep-passes",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out.moec").read_text() == "artifact with passes"
    size = compiler.request["dynamic_shapes"]["ids"][0]
    assert (size.min, size.max) == (1, 64)
    assert compiler.request.items() >= {
        "model": "model", "target": "avx2", "dtype": "bfloat16", "opt_level": 1, "strict": True,
        "quant": "int4:64", "calib": str(calib), "budget": "kl<=0.1", "verify": 1e-3,
        "passes": "+join-linears,-fuse-gate", "stop_after": None,
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("word", "value"), [("off", False), ("on", True), ("quick", "quick"), ("full", "full")]
)
def test_verify(compiler: FakeCompiler, tmp_path: Path, word: str, value: bool | str) -> None:
    run("-o", tmp_path / "out.moec", "--verify", word)
    assert compiler.request["verify"] == value


def test_json_is_one_document(compiler: FakeCompiler, tmp_path: Path) -> None:
    out = tmp_path / "out.moec"
    result = run("-o", out, "--json")
    report = json.loads(result.stdout)
    assert report.pop("output") == str(out)
    assert Report.of_dict(report) == models.report()
    assert result.stderr == ""


@pytest.mark.parametrize("other", ["--quiet", "--json"])
def test_a_report_that_nobody_would_see_is_refused(compiler: FakeCompiler, other: str) -> None:
    result = run("--dry-run", "--report", other)
    assert result.exit_code == 2
    assert "--report is for people: leave it out with --quiet and --json" in result.stderr
    assert compiler.request == {}


def test_quiet_is_silent(compiler: FakeCompiler, tmp_path: Path) -> None:
    result = run("-o", tmp_path / "out.moec", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_dry_run_builds_nothing(compiler: FakeCompiler, tmp_path: Path) -> None:
    result = run("--dry-run")
    assert result.exit_code == 0
    assert "wrote" not in result.stdout
    assert "3 MoE blocks" in result.stdout
    assert "7.5 kB f32, 7.5 kB packed" in result.stdout
    assert "note: no code was generated; the packed size is an estimate" in result.stdout
    assert compiler.request["build"] is False


def test_a_memory_that_is_no_size_is_reported_at_once(compiler: FakeCompiler) -> None:
    result = run("--dry-run", "--memory", "6gigs")
    assert result.exit_code == 2
    assert "error: memory is '6gigs': give bytes, or a size with GiB" in result.stderr
    assert compiler.request == {}


def test_stop_after_with_a_folder_reports_instead(compiler: FakeCompiler, tmp_path: Path) -> None:
    result = run("--stop-after", "recognise", "--dump-ir", tmp_path)
    assert "3 MoE blocks" in result.stdout


def test_where_nothing_can_be_written(compiler: FakeCompiler, tmp_path: Path) -> None:
    """Said before the work, not after."""
    out = tmp_path / "out.moec"
    out.write_text("mine")
    cases = {
        ("-o", str(out)): f"error: {out} exists; --force replaces it\n",
        (): "error: name the artifact with -o OUT.moec, or compile nothing with --dry-run\n",
        ("-o", str(tmp_path / "no" / "x.moec")): (
            f"error: {tmp_path}/no/x.moec: the folder {tmp_path}/no does not exist: "
            "create it first\n"
        ),
    }
    for arguments, words in cases.items():
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (1 if arguments else 2, words)
    assert compiler.request == {}
    assert out.read_text() == "mine"
    assert run("-o", out, "--force").exit_code == 0
    assert out.read_text() == "artifact"


def test_a_full_disk_is_told_before_the_work(
    compiler: FakeCompiler, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, weights = shutil.disk_usage(tmp_path), (tiny_moe / "model.safetensors").stat().st_size
    least = {"": 1.0, "--passes=-fuse-gate": 1.0, "--dtype f32": 1.0, "--quant int4:64": 1 / 4}
    least |= {"--quant int8,head=int2": 1 / 8, "--passes +prune-experts(keep=0.5)": 1 / 16}
    for words, share in least.items():
        for room, code in ((0.97, 1), (1.03, 0)):
            free = usage._replace(free=int(room * share * weights / 2))
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: free)
            result = invoke("compile", tiny_moe, "-o", tmp_path / f"{words}.moec", *words.split())
            assert result.exit_code == code
            assert (f"GB are free in {tmp_path}: free some space" in result.stderr) == bool(code)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CaptureError("model: no such file"), 1, "error: model: no such file"),
        (VerificationError("fuse-gate changes logits"), 4, "error: fuse-gate changes logits"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("boom"), 70, "RuntimeError: boom"),
    ],
)
def test_failures_leave_nothing_behind(
    compiler: FakeCompiler, tmp_path: Path, error: BaseException, code: int, words: str
) -> None:
    compiler.error = error
    result = run("-o", tmp_path / "out.moec", "--quiet")
    assert result.exit_code == code
    assert result.stderr.strip().splitlines()[0] == words
    assert list(tmp_path.iterdir()) == []


SLOW = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
api = types.ModuleType("moec.api")
def compile(model, progress, **options):
    progress("kernels")
    time.sleep(60)
api.compile = compile
sys.modules["moec.api"] = api
from moec.__main__ import main
main()
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle(tmp_path: Path, sent: int, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, "compile", f"{__file__}:make", "-o", tmp_path / "out.moec"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        while "kernels" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(sent)
        message = process.stderr.read()
    assert process.returncode == code
    assert "stopped in kernels" in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []
