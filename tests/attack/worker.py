"""Runs cases in a separate process, which may crash: `python -m tests.attack.worker FOLDER KIND
SEED FIRST LAST`. Prints a line before each case, and one after it with its errors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from click.testing import CliRunner

from tests.attack.kinds import KINDS, Words, stream
from tests.attack.watch import Watch

EXIT_CODES = (0, 1, 2, 4)


def faults(words: Words, watch: Watch, refuses: bool = False) -> list[str]:
    """The errors in how a command ended: its exit code, its output, and its actions. With
    `refuses`, it must not succeed."""
    from moec.__main__ import cli

    with watch.acts() as acts:
        done = CliRunner().invoke(cli, words, prog_name="moec")
    result = [f"did what nobody asked for: {act}" for act in acts]
    if done.exit_code not in EXIT_CODES:
        result.append(f"exit code {done.exit_code}: {done.stderr.strip() or done.exception!r}")
    elif refuses and not done.exit_code:
        result.append("succeeds, and should refuse its file")
    elif done.exit_code and not done.stderr.strip():
        result.append(f"exit code {done.exit_code} without a word")
    return result


def main() -> None:
    folder, kind, seed, first, last = sys.argv[1:]
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is not the report
    attack = KINDS[kind]
    watch = Watch((Path(folder),), attack.acts)
    for number in range(int(first), int(last)):
        draw = stream(kind, int(seed), number)

        def begins(words: Words, number: int = number) -> None:
            report.write(json.dumps({"case": number, "words": words}) + "\n")

        def ends(words: Words, errors: list[str], number: int = number) -> None:
            for fault in errors:
                report.write(json.dumps({"case": number, "words": words, "fault": fault}) + "\n")

        if attack.use is not None:
            begins([kind])
            with watch.acts() as acts:
                errors = attack.use(Path(folder), draw)
            ends([kind], [*errors, *(f"did what nobody asked for: {act}" for act in acts)])
        for words in attack.case(Path(folder), draw):
            begins(words)
            ends(words, faults(words, watch, attack.refuses))


if __name__ == "__main__":
    main()
