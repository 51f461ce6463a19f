"""The long attack, by hand: `python -m tests.attack [KIND ...] [--seed N] [--cases N]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.attack.attack import attack
from tests.attack.kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--cases", type=int, help="default: 200 to 10,000")
    parser.add_argument("--keep", type=Path, help="a folder for the files of the last case")
    options = parser.parse_args()
    count = 0
    with tempfile.TemporaryDirectory(prefix="moec-attack-") as temporary:
        folder = options.keep or Path(temporary)
        for kind in options.kinds or KINDS:
            KINDS[kind].seeds(folder)
            start = time.perf_counter()
            cases = options.cases or KINDS[kind].long
            before = count
            for fault in attack(kind, options.seed, options.first, options.first + cases, folder):
                print(fault, flush=True)
                count += 1
            seconds = time.perf_counter() - start
            print(f"{kind}: {cases} cases, {count - before} faults, {seconds:.0f} s", flush=True)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
