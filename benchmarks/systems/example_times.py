"""The time and memory of each example of a system, run as a user does who has just installed moec.

    python -m benchmarks.systems.example_times [--systems 6,21] [--record FILE.jsonl]

Each file of examples/systems/ runs without options in a process of its own, on two cores and with
an empty cache of compiled kernels. The script prints the seconds from start to end, imports and
compilations included, the CPU seconds of all threads, which other processes change less, and the
greatest resident memory. It ends with 1 if an example fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.target.cpu import processor

ROOT = Path(__file__).resolve().parents[2]
CORES = 2


def measure(path: Path) -> dict[str, Cell] | None:
    """The row of one example; None if it fails, with its errors on stderr."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"MOEC_CACHE": cache, "PYTHONPATH": str(ROOT)}
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(path)], env=environment, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return None
    # Linux counts the memory in KiB.
    return {
        "seconds": round(seconds, 1),
        "CPU seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "MB": round(usage.ru_maxrss / 1024),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", default="", help="numbers, separated by commas; all")
    add_record_options(parser, processor())
    options = parser.parse_args()
    numbers = {int(n) for n in options.systems.split(",") if n}
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:CORES]))
    failed = False
    for path in sorted((ROOT / "examples" / "systems").glob("[0-9][0-9]_*.py")):
        if numbers and int(path.stem[:2]) not in numbers:
            continue
        conditions = f"{CORES} cores, empty cache; load average before {os.getloadavg()[0]:.1f}"
        row = measure(path)
        if row is None:
            print(f"{path.stem}: failed", flush=True)
            failed = True
            continue
        case = path.stem.replace("_", " ")
        print(case, *(f"{key} {cell}" for key, cell in row.items()), sep="  ", flush=True)
        record_if_asked(options, "system-examples", case, [row], conditions)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
