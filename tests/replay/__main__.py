"""Runs the suite here and at another commit, and shows differences in passes and kernels.

    python -m tests.replay [--base COMMIT] [--jobs N] [arguments of pytest]

git compares the two folders of texts, so that a test that moved is no difference.

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


class ReplayError(Exception):
    """Nothing can be compared."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.replay", allow_abbrev=False)
    parser.add_argument("--base", default="HEAD^", help="a commit; default: the one before HEAD")
    parser.add_argument("--jobs", default="2", help="processes of pytest")
    options, tests = parser.parse_known_args(arguments)
    try:
        return _replay(Path.cwd(), options.base, options.jobs, tests)
    except ReplayError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2


def _replay(root: Path, base: str, jobs: str, tests: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="moec-replay-") as name:
        folder = Path(name)
        with worktree(root, base, folder / "tree") as tree:
            _record(tree, folder / "base", jobs, tests, f"base {base}")
        _record(root, folder / "here", jobs, tests, "this commit")
        return compare(folder)


def compare(folder: Path) -> int:
    """Print the differences of `folder`/base and `folder`/here; 1 if there are any, else 0.

    Raises ReplayError where one of them is empty: then equality would mean nothing.
    """
    counts = {side: sum(1 for _ in (folder / side).rglob("*.txt")) for side in ("base", "here")}
    if not all(counts.values()):
        raise ReplayError(f"nothing is compared: {counts['base']} and {counts['here']} records")
    git = ("git", "diff", "--no-index", "--find-renames=50%", "-l0", "--unified=2")
    shown = subprocess.run([*git, "base", "here"], cwd=folder, capture_output=True, text=True)
    files = shown.stdout.split("diff --git ")[1:]
    changed = [file for file in files if "\nsimilarity index 100%\n" not in file]
    print(*changed, sep="\n")
    print(f"replay: {len(changed)} differences in {counts['here']} tests and what they share")
    return 1 if changed else 0


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


def _record(root: Path, folder: Path, jobs: str, tests: Sequence[str], title: str) -> None:
    """Run the suite of `root`, with `moec` of `root`, whatever is installed."""
    print(f"replay: the tests of {title}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line"]
    command += ["-p", "no:cacheprovider", "-p", "tests.replay.plugin", f"--replay={folder}"]
    command += ["-n", jobs, "--dist", "worksteal", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    status = subprocess.run(command, cwd=root, env=environment).returncode
    if status == 1:
        print(f"replay: tests fail at {title}; what they made until then is compared")
    elif status:
        raise ReplayError(f"pytest cannot run {' '.join(tests)} at {title} (exit {status})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
