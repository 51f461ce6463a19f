"""Generates MoE layers in common styles, compiles them, and counts the outcomes.

    python -m tests.fuzz --count N --seed S        counts of outcomes, and each that is wrong
    python -m tests.fuzz --seed S --only 17        one of them: its source and its outcome

The graph after all passes is interpreted. Every 20th layer is also compiled to machine code and
run; the last line has their number. `--results FILE` appends the counts to a file of records, in
which they add up from run to run.

Exit status: 1 if a layer was wrong, crashed, or does not run in eager.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.records import Record, append_record, measured_now
from moec.target.cpu import processor
from tests.fuzz.judge import Outcome, in_folder, judge
from tests.fuzz.layer import draw, source

BAD = (Outcome.WRONG, Outcome.CRASH, Outcome.EAGER)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=100, help="layers; default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    parser.add_argument("--start", type=int, default=0, help="number of the first layer")
    parser.add_argument("--only", type=int, help="this layer alone, with its source")
    parser.add_argument("--build", action="store_true", help="machine code of every layer")
    parser.add_argument("--build-every", type=int, default=20, help="of each such; default: 20")
    parser.add_argument("--record", type=Path, help="a file for one line of JSON a layer")
    parser.add_argument("--results", type=Path, help="a file of records, for the counts")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    numbers = range(options.start, options.start + options.count)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
        print(source(draw(options.seed, options.only)))
    counts: collections.Counter[Outcome] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    begin = time.monotonic()
    with in_folder() as folder:
        for number in numbers:
            layer, start = draw(options.seed, number), time.monotonic()
            name = f"layer_{options.seed}_{number}"
            built = options.build or (number + 1) % options.build_every == 0
            verdict = judge(layer, name, Path(folder), built)
            kinds["machine code" if built else "interpreted"] += 1
            seconds = time.monotonic() - start
            counts[verdict.outcome] += 1
            if verdict.outcome in BAD or options.only is not None:
                print(f"{number}: {verdict.outcome}: {verdict.words}\n    {layer}", flush=True)
            if options.record:
                line = {
                    "number": number,
                    "outcome": verdict.outcome,
                    "seconds": round(seconds, 1),
                    "words": verdict.words[-1500:],
                    "layer": str(layer),
                }
                with options.record.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    for outcome in Outcome:
        print(f"{counts[outcome]:6} {outcome}")
    seconds = (time.monotonic() - begin) / max(1, kinds.total())
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    print(f"{seconds:.1f} s a layer: {shown}")
    if options.results:
        append_record(_record(options, counts, kinds), options.results)
    return int(any(counts[outcome] for outcome in BAD))


def _record(
    options: argparse.Namespace,
    counts: collections.Counter[Outcome],
    kinds: collections.Counter[str],
) -> Record:
    compilable = counts.total() - counts[Outcome.EAGER]
    compiled = counts[Outcome.BLOCKS] + counts[Outcome.DENSE]
    first = options.start
    row = {
        "layers": counts.total(),
        "machine code": kinds["machine code"],
        **{str(outcome): counts[outcome] for outcome in Outcome},
        "compiled %": round(100 * compiled / max(1, compilable), 1),
    }
    case = f"seed {options.seed}, from {first}"
    record = measured_now("fuzz", case, processor(), [row], "one thread")
    words = f"--count {options.count} --seed {options.seed} --start {first}"
    return replace(record, command=f"python -m tests.fuzz {words}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
