"""What a benchmark prints, which `--append FILE` also adds to a Markdown file, with the command."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch

Say = Callable[[str], None]


def add_append_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--append", type=Path, help="add what is printed to this Markdown file")


@contextmanager
def printed(title: str, module: str, append: Path | None) -> Iterator[Say]:
    """Print lines, the first of which describes the conditions; after the block, add them to the
    file `append` under `title`, with the command that runs `module`."""
    messages: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        messages.append(line)

    say(f"one thread, torch {torch.__version__}, load average before: {os.getloadavg()[0]:.1f}")
    yield say
    if append is None:
        return
    words = [word for word in sys.argv[1:] if word not in ("--append", str(append))]
    command = shlex.join(["python", "-m", module, *words])
    body = textwrap.indent("\n".join(messages).rstrip(), "    ")
    with append.open("a", encoding="utf-8") as file:
        file.write(f"\n## {title}\n\n{date.today()}\n\n    $ {command}\n{body}\n")
