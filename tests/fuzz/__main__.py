"""Generates MoE layers in common styles, compiles them, and counts the outcomes.

    python -m tests.fuzz --count N --seed S        counts of outcomes, and each that is wrong
    python -m tests.fuzz --seed S --only 17        one of them: its source and its outcome
    python -m tests.fuzz --seed S --rewritten      equal forms of their graphs, beside the graphs

The graph after all passes is interpreted. Every 20th layer is also compiled to machine code and
run; the last line has their number. A form has one to three rewrites (`tests.fuzz.rewrites`).

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
from pathlib import Path

import torch

from tests.fuzz.judge import Outcome, in_folder, judge
from tests.fuzz.layer import draw, source
from tests.fuzz.rewrites import rewritten_layer

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
    parser.add_argument("--rewritten", action="store_true", help="forms of graphs, interpreted")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    numbers = range(options.start, options.start + options.count)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
        print(source(draw(options.seed, options.only)))
    counts: collections.Counter[Outcome] = collections.Counter()
    changes: collections.Counter[str] = collections.Counter()
    builds, begin = 0, time.monotonic()
    with in_folder() as folder:
        for number in numbers:
            layer, start = draw(options.seed, number), time.monotonic()
            name = f"layer_{options.seed}_{number}"
            every = 1 if options.build else options.build_every
            built = not options.rewritten and (number + 1) % every == 0
            if options.rewritten:
                before, verdict = rewritten_layer(layer, name, Path(folder))
                if before is not verdict.outcome:
                    changes[f"{before} -> {verdict.outcome}"] += 1
            else:
                verdict = judge(layer, name, Path(folder), built)
            builds += built
            counts[verdict.outcome] += 1
            if verdict.outcome in BAD or options.only is not None:
                print(f"{number}: {verdict.outcome}: {verdict.words}\n    {layer}", flush=True)
            if options.record:
                line = {
                    "number": number,
                    "outcome": verdict.outcome,
                    "seconds": round(time.monotonic() - start, 1),
                    "words": verdict.words[-1500:],
                    "layer": str(layer),
                }
                with options.record.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    for outcome in Outcome:
        print(f"{counts[outcome]:6} {outcome}")
    for change, count in sorted(changes.items()):
        print(f"{count:6} {change}")
    seconds = (time.monotonic() - begin) / max(1, counts.total())
    print(f"{seconds:.1f} s a layer; machine code of {builds}")
    return int(any(counts[outcome] for outcome in BAD))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
