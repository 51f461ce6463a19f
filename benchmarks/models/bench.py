"""`moec bench`, with its result as a record.

    python -m benchmarks.models.bench --machine "AMD EPYC, Zen 4" -- model --artifact bf16.moec \\
        --baseline eager,llama.cpp --file model-bf16.gguf --prompt-tokens 512

The arguments after `--` are those of `moec bench`; benchmarks/models/granite.py makes such a model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Cell, Record, append_record, measured_now


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Cell]]:
    """One row per runtime, moec first: rates with their interquartile range, and ratios to moec."""
    rows: list[dict[str, Cell]] = []
    for line in result["lines"]:
        row: dict[str, Cell] = {"runtime": line["name"]}
        for phase in ("prefill", "decode"):
            figure = line[phase]
            row[f"{phase} tokens/s"] = round(figure["median"], 1)
            row[f"{phase} from"] = round(figure["low"], 1)
            row[f"{phase} to"] = round(figure["high"], 1)
            row[f"{phase} ratio"] = round(line[f"{phase}_ahead"], 2)
        rows.append(row)
    return rows


def record_of(result: Mapping[str, Any], options: argparse.Namespace) -> Record:
    """The record of the output of `moec bench WORDS --json`, with the options of `main`."""
    rows, limits, load = rows_of(result), result["limits"], result["load"]
    others = ", ".join(str(row["runtime"]) for row in rows[1:])
    case = f"{options.case} beside {others}"
    conditions = (
        f"measured peak {limits['peak'] / 1e9:.0f} GFLOP/s in {limits['kind']}, bandwidth "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s, load average {result['load_average']:.1f} before; "
        f"{load['batch']} x {load['prompt']} tokens read, then {load['batch']} x {load['new']} "
        f"written one by one; {result['threads']} threads; moec's prefill at "
        f"{result['prefill_share']:.0%} of the measured limit, its decode at "
        f"{result['decode_share']:.0%}"
    )
    record = measured_now(options.claim, case, options.machine, rows, conditions)
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    named = [Path(word).name if "/" in word else word for word in options.words]
    return replace(record, command=shlex.join(["moec", "bench", *named]), versions=versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--machine", required=True, help="its kind, as in the other records")
    parser.add_argument("--claim", default="model", help="whose page has the record")
    parser.add_argument("--case", default="bf16", help="what moec computes in: bf16, int8")
    parser.add_argument("--record", type=Path, default=RESULTS / "models.jsonl")
    parser.add_argument("words", nargs="+", metavar="ARGUMENT", help="of moec bench")
    options = parser.parse_args()
    bench = [sys.executable, "-m", "moec", "bench", *options.words, "--json"]
    done = subprocess.run(bench, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    append_record(record_of(result, options), options.record)
    print(json.dumps(rows_of(result), indent=1))


if __name__ == "__main__":
    main()
