"""Log messages go to stderr and a file on request, and nowhere else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import pytest

from moec import __main__ as front
from moec.commands.options.options import quiet_option
from moec.commands.output.logs import LOGGER, log_options
from tests.command_line import invoke


@pytest.fixture(autouse=True)
def doctor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`moec doctor` logs."""

    @click.command("doctor")
    @quiet_option
    @log_options
    def command(quiet: bool) -> None:
        logging.getLogger("moec.passes.core.runner").debug("fuse-norm\x1b[2J: 3 rewrites")
        logging.getLogger("moec.model.clock").info("capture took 2 s")
        logging.getLogger("torch").error("not moec's")
        click.echo("healthy")

    monkeypatch.setattr(front.LazyGroup, "get_command", lambda self, ctx, name: command)
    yield
    assert (LOGGER.level, LOGGER.handlers) == (logging.NOTSET, [])


doctor_says = partial(invoke, "doctor")


@pytest.mark.parametrize(
    ("option", "lines"),
    [
        (None, []),
        ("-v", ["moec.model.clock: capture took 2 s"]),
        (
            "-vv",
            [
                r"moec.passes.core.runner: fuse-norm\x1b[2J: 3 rewrites",
                "moec.model.clock: capture took 2 s",
            ],
        ),
    ],
)
def test_verbose(option: str | None, lines: list[str]) -> None:
    result = doctor_says(*([option] if option else []))
    assert result.exit_code == 0
    assert result.stdout == "healthy\n"
    assert result.stderr.splitlines() == lines


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "moec.log"
    path.write_text("of yesterday")
    result = doctor_says("--log-file", path)
    assert (result.stdout, result.stderr) == ("healthy\n", "")
    first, second = path.read_text().splitlines()
    assert first.endswith(r"DEBUG moec.passes.core.runner: fuse-norm\x1b[2J: 3 rewrites")
    assert second.endswith("INFO moec.model.clock: capture took 2 s")


def test_mistakes(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "x.log"
    for words, message in (
        (("-v", "-q"), "--verbose and --quiet cannot be combined"),
        (("--log-file", tmp_path), f"--log-file {tmp_path} is a folder: give the name of a file"),
        (("--log-file", missing), f"--log-file {missing}: the folder {missing.parent} does not"),
    ):
        result = doctor_says(*words)
        assert result.exit_code == (2 if "-v" in words else 1)
        assert result.stderr.startswith(f"error: {message}")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_costs_the_log_alone() -> None:
    result = doctor_says("--log-file", "/dev/full")
    assert (result.exit_code, result.stdout) == (0, "healthy\n")
    assert result.stderr == "warning: --log-file /dev/full: the disk is full; free some space\n"
