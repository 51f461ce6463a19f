"""Runs the suite here and at another commit, and shows differences in passes and kernels.

    python -m tests.replay [--base COMMIT] [--jobs N] [arguments of pytest]

Exit status: 0 no difference, 1 a difference, 2 nothing that can be compared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.replay.compare import compare, report
from tests.replay.records import Folder


class ReplayError(Exception):
    """Nothing can be compared."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.replay", allow_abbrev=False)
    parser.add_argument("--base", default="HEAD^", help="a commit; default: the one before HEAD")
    parser.add_argument("--jobs", default="2", help="processes of pytest")
    options, tests = parser.parse_known_args(arguments)
    try:
        return _replay(Path.cwd(), options.base, options.jobs, tests)
    except (ReplayError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2


def _replay(root: Path, base: str, jobs: str, tests: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="moec-replay-") as name:
        before, after = Folder(Path(name) / "base"), Folder(Path(name) / "here")
        with worktree(root, base, Path(name) / "tree") as tree:
            _record(tree, before, jobs, tests, f"base {base}")
        _record(root, after, jobs, tests, "this commit")
        comparison = compare(before, after)
        for line in report(comparison, before, after):
            print(line)
    return 1 if comparison.changes else 0


@contextmanager
def worktree(root: Path, commit: str, path: Path) -> Iterator[Path]:
    """The files of a commit of the repository at `root`, in `path` until the context ends.

    Raises ReplayError where there is no such commit, or it cannot record.
    """
    git = ("git", "-C", str(root), "worktree")
    added = subprocess.run(
        [*git, "add", "--quiet", "--detach", str(path), commit], capture_output=True, text=True
    )
    if added.returncode:
        raise ReplayError(f"cannot check out {commit}: {added.stderr.strip()}")
    try:
        if not (path / "tests" / "replay" / "plugin.py").exists():
            raise ReplayError(f"{commit} has no tests/replay: it is older than replay is")
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", str(path)], check=True)


def _record(root: Path, folder: Folder, jobs: str, tests: Sequence[str], title: str) -> None:
    """Run the suite of `root`, with `moec` of `root`, whatever is installed."""
    print(f"replay: the tests of {title}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line"]
    command += ["-p", "no:cacheprovider", "-p", "tests.replay.plugin", f"--replay={folder.path}"]
    command += ["-n", jobs, "--dist", "worksteal", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    status = subprocess.run(command, cwd=root, env=environment).returncode
    if status == 1:
        print(f"replay: tests fail at {title}; what they made until then is compared")
    elif status:
        raise ReplayError(f"pytest cannot run {' '.join(tests)} at {title} (exit {status})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
