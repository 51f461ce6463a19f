"""The first run on a GPU, in about ten minutes: is each kernel right, and how fast is it?

    python -m benchmarks.cuda.first_run
    python -m benchmarks.cuda.first_run --dry-run     the same on this CPU, without times

It writes one JSON file, after every step, to be sent to the project whatever is in it. Each check
and each table of times is a process of its own, so that a kernel that never ends or faults costs
this check alone. Times are microseconds of one MoE layer in bf16: moec, torch eager, grouped_mm,
Triton, and vLLM's fused_experts; a contender that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.cuda.__main__ import lacking
from benchmarks.records import commit_here
from moec.target import cuda, nvidia

Report = dict[str, Any]
LAYERS = ("qwen3-30b-a3b", "mixtral-8x7b", "granite-1b-a400m")
TOKENS = (1, 16, 256, 4096)
CONTENDERS = ("moec", "eager", "grouped_mm", "triton", "vllm", "cublas")
PACKAGES = ("moec", "apache-tvm", "torch", "transformers", "triton", "vllm")
SECONDS, DRY_SECONDS = 150, 600
"""For one check; most of it is for nvcc, or for kernels of this CPU beside three others."""
AT_ONCE = 4
"""Checks that are compiled at the same time; times are measured alone."""
CHECK, TIMES = "check", "times"


def child(what: str, name: str, options: argparse.Namespace, seconds: float) -> Report:
    """The last line of a process that runs one step, or how it failed."""
    words = [sys.executable, "-m", "benchmarks.cuda.first_run", "--step", what, name]
    words += ["--dry-run"] if options.dry_run else []
    start = time.perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no end after {seconds:.0f} s"}
    took = {"seconds": round(time.perf_counter() - start, 1)}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"failed": f"exit code {done.returncode}: {lines[-1]}", **took}
    return {**json.loads(done.stdout.strip().splitlines()[-1]), **took}


def step(what: str, name: str, dry: bool) -> Report:
    """Runs one step in this process. Raises SystemExit where a result is wrong."""
    device, target = ("cpu", "cpu") if dry else ("cuda:0", cuda.KIND)
    if what == CHECK:
        from benchmarks.cuda.checks import CHECKS, outcome

        check = CHECKS[name]
        if dry and (check.target or check.later):
            return {"left out": "it needs a GPU"}
        # On a CPU the kernels have other names.
        return asdict(outcome(replace(check, kernels=()) if dry else check, device, target))
    from benchmarks.cuda.layers import times
    from benchmarks.cuda.shapes import LAYERS as SHAPES

    return {"rows": list(times(SHAPES[name], TOKENS, device, target, CONTENDERS))}


def machine() -> Report:
    """What this machine is, as far as it bears on the results."""
    driver, versions = nvidia.driver(), {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    compiler = nvidia.nvcc() or nvidia.nvrtc()
    return {
        "date": date.today().isoformat(),
        "commit": commit_here(),
        "gpus": [] if driver is None else [asdict(gpu) for gpu in driver.gpus],
        "driver": None if driver is None else driver.version,
        "compiler": None if compiler is None else f"{compiler.name} {compiler.version}",
        "python": platform.python_version(),
        "versions": versions,
    }


def steps(
    options: argparse.Namespace, checks: Sequence[str], run: Callable[..., Report]
) -> Iterator[tuple[str, str, Report]]:
    """Kind, name and report of each step, as they end."""
    end = time.monotonic() + 60 * options.minutes
    limit = DRY_SECONDS if options.dry_run else SECONDS
    with ThreadPoolExecutor(AT_ONCE) as pool:
        reports = pool.map(lambda name: run(CHECK, name, options, limit), checks)
        for name, report in zip(checks, reports, strict=True):
            yield CHECK, name, report
    for name in () if options.dry_run else LAYERS:
        # The last table is cut off at twice the time rather than at once.
        left = end - time.monotonic()
        yield (
            TIMES,
            name,
            run(TIMES, name, options, 60 + left) if left > 0 else {"left out": "time"},
        )


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dry-run", action="store_true", help="on this CPU, without times")
    parser.add_argument("--only", default="", help="checks, with commas between them")
    parser.add_argument("--minutes", type=float, default=10, help="no times start after these")
    parser.add_argument("-o", "--output", type=Path, default=Path("moec-first-run.json"))
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None, run: Callable[..., Report] = child) -> None:
    options = parsed(words)
    if options.step:
        print(json.dumps(step(*options.step, options.dry_run)))
        return
    if not options.dry_run and (reason := lacking("--dry-run tries it on this CPU")):
        raise SystemExit(reason)
    from benchmarks.cuda.checks import CHECKS

    names = options.only.split(",") if options.only else [*CHECKS]
    if unknown := set(names) - set(CHECKS):
        raise SystemExit(f"there is no check {unknown.pop()!r}: the checks are {', '.join(CHECKS)}")
    report: Report = {**machine(), "dry": options.dry_run, CHECK: {}, TIMES: {}}
    for what, name, result in steps(options, names, run):
        report[what][name] = result
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{what} {name}: {_told(result)}", flush=True)
    failed = [name for name, result in report[CHECK].items() if "failed" in result]
    print(f"{len(failed)} of {len(names)} checks failed; send {options.output} in an issue")
    if failed:
        raise SystemExit(1)


def _told(result: Report) -> str:
    for word in ("failed", "left out"):
        if word in result:
            return f"{word}: {result[word]}"
    if "rows" in result:
        return "".join(
            "\n  " + "  ".join(f"{k} {v}" for k, v in row.items()) for row in result["rows"]
        )
    return f"right, error {result['error']:.1e} of the greatest, {result['seconds']} s"


if __name__ == "__main__":
    main()
