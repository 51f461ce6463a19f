"""The command line in the process of a test."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from moec.__main__ import cli


def invoke(*words: object, **options: Any) -> Result:
    """What `moec WORDS` does; `options` are those of click's runner, such as `env` and `input`."""
    return CliRunner().invoke(cli, [*map(str, words)], prog_name="moec", **options)
