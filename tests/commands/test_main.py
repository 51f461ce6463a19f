"""The command line: help without imports, exit codes, one sentence for every mistake."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from moec import __main__ as front
from moec.errors import Exit, UsageError, VerificationError
from tests.command_line import invoke


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`moec doctor` raises `error`."""

    @click.command("doctor")
    def command() -> None:
        raise error

    monkeypatch.setattr(front.LazyGroup, "get_command", lambda self, ctx, name: command)


def test_help_lists_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in front.COMMANDS:
        assert f"  {name} " in result.stdout
    assert "List passes, targets, models or formats." in result.stdout
    assert "Run an artifact or a model on inputs" in result.stdout


@pytest.mark.parametrize("name", sorted(front.COMMANDS))
def test_every_command_has_help_and_its_line(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0, result.stderr
    assert f"Usage: moec {name}" in result.stdout


def test_version() -> None:
    result = invoke("--version")
    assert result.stdout.startswith("moec 0.")


def test_no_command_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Usage: moec" in result.stderr
    assert "error" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compil"], "error: no such command 'compil'; did you mean 'compile'?"),
        (["frobnicate"], "error: no such command 'frobnicate'; the commands are compile, run"),
        (["compile"], "error: Missing argument 'MODEL'; see moec compile --help"),
        (["compile", "m", "--verify", "soon"], "give TOL|off|quick|full|layers|whole"),
        (["compile", "m", "--verify", "-1"], "'-1' is not a tolerance"),
        (["compile", "m", "--verify", "nan"], "'nan' is not a tolerance"),
        (["compile", "m", "--dtype", "int8"], "'int8' is not one of float32, bfloat16, float16"),
        (["compile", "m", "-O", "4"], "4 is not in the range 0<=x<=2"),
        (["compile", "m", "--fast"], "error: No such option"),
        (["list", "cats"], "'cats' is not one of passes, targets, models"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("verify none.moec", Exit.SETUP),
        ("compile no/model -o x.moec", Exit.SETUP),
        ("compile examples/tiny_moe/checkpoint -o none/x.moec", Exit.SETUP),
        ("compile examples/tiny_moe/checkpoint --dry-run --calib none.npz", Exit.SETUP),
        ("compile examples/tiny_moe/checkpoint --dry-run --quant int7", Exit.USAGE),
        ("run none.moec", Exit.USAGE),
    ],
)
def test_what_is_wrong_decides_on_the_code(words: str, code: Exit) -> None:
    assert invoke(*words.split()).exit_code == code


def test_the_page_has_every_code() -> None:
    page = (Path(__file__).parents[2] / "docs/install.md").read_text(encoding="utf-8")
    codes = re.findall(r"^\| (\d+) \|", page.partition("## Exit codes")[2], re.MULTILINE)
    assert [int(code) for code in codes] == list(Exit)


def test_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, UsageError("the model is missing"))
    result = invoke("doctor")
    assert (result.exit_code, result.stderr) == (2, "error: the model is missing\n")


def test_a_failed_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, VerificationError("fuse-gate changes the numbers"))
    result = invoke("doctor")
    assert (result.exit_code, result.stderr) == (4, "error: fuse-gate changes the numbers\n")


@pytest.mark.parametrize(
    ("number", "file", "words"),
    [
        (errno.ENOSPC, "out.moec", "out.moec: the disk is full; free some space"),
        (errno.EFBIG, None, "output: it is larger than is allowed"),
        (errno.EMFILE, "w", "w: too many files are open; raise the limit (ulimit -n)"),
        (errno.EIO, "w", "w: the disk failed; look at the system's log"),
    ],
)
def test_a_full_disk_and_limits(
    monkeypatch: pytest.MonkeyPatch, number: int, file: str | None, words: str
) -> None:
    failing(monkeypatch, OSError(number, "in the system's words", file))
    result = invoke("doctor")
    assert (result.exit_code, result.stderr) == (1, f"error: {words}\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError("libtvm_runtime.so: failed to map segment from shared object"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("can't start new thread"),
    ],
)
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    failing(monkeypatch, error)
    assert (
        invoke("doctor").stderr == "error: this machine has too little free memory for the model\n"
    )


def test_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError("division\nby zero"))
    result = invoke("doctor")
    assert result.exit_code == 70
    assert result.stderr == (
        "ZeroDivisionError: division by zero\nthis is a bug in moec; set MOEC_DEBUG=1 to see the "
        "traceback\n"
    )


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, UsageError("the model is missing"))
    result = invoke("doctor", env={"MOEC_DEBUG": "1"})
    assert isinstance(result.exception, UsageError)


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    result = invoke("doctor")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_interrupted_while_a_command_is_imported(tmp_path: Path) -> None:
    """numpy's own import turns the interruption into an ImportError."""
    (tmp_path / "planted.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell ignores it\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise ImportError('umath failed to import')\n"
    )
    code = "from moec import __main__ as m; m.COMMANDS['doctor'] = ('planted', ''); m.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "interrupted")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("moec com", "compile compare"),
        ("moec compile --target avx512", "avx512 avx512-bf16"),
        ("moec compile --target cuda:sm_10", "cuda:sm_100a"),
        ("moec compile --quant int4", "int4 int4:32 int4:64 int4:128"),
        ("moec export --format g", "gguf"),
    ],
)
def test_completion_offers_commands_and_values(words: str, offered: str) -> None:
    where = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = invoke(env={"_MOEC_COMPLETE": "bash_complete", **where})
    assert result.stdout.split() == [f"plain,{value}" for value in offered.split()]


def test_help_has_first_what_is_most_used() -> None:
    for command, first in (("run", ["memory", "prompt"]), ("compile", ["output", "memory"])):
        options = invoke(command, "--help").stdout.partition("\nOptions:")[2]
        assert re.findall(r"\n  (?:-\w, )?--([\w-]+)", options)[:2] == first


def test_help_and_version_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from moec.__main__ import cli\n"
        "try: cli(sys.argv[1:], prog_name='moec')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'tvm', 'sympy', 'numpy', 'rich', 'transformers', 'numba'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["--version"], ["compile", "--help"], ["inspect", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stderr == "[]\n", arguments


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moec", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such command 'nonsense'")


def test_nothing_is_collected_as_the_process_ends() -> None:
    """With a large model that took longer than to write its artifact."""
    program = (
        "import atexit, gc\n"
        "from moec.__main__ import main\n"
        "atexit.register(lambda: print(len(gc.get_objects())))\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.splitlines()[-1]) < 1000
