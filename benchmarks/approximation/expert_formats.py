"""Formats of single experts beside formats of products, at the bytes of one format for all.

    python -m benchmarks.approximation.expert_formats examples/tiny_moe/checkpoint
        --calib TEXT.txt --text OTHER.txt [--formats int8,int4:32,int3:64,int2:64]

Chosen on the text of --calib, and measured on windows of another one; codes rounded to nearest.
Between two formats are the mean of their bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise

from moec.optimisation.optimize import search
from moec.optimisation.pareto import in_one_format
from moec.optimisation.search import ChoiceSearch
from moec.optimisation.solve import SolvedChoice
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--formats", default="int8,int4:32,int3:64,int2:64")
    options = parser.parse_args()
    formats = options.formats.split(",")
    searched = search(
        options.model, calib=options.calib, formats=formats, moves=("formats", "expert-formats")
    )
    source, lowered = searched.compiled.source, searched.compiled.pass_results[-1].program
    other = Evaluator(lowered, load_calibration(options.text, lowered, source.files))
    searched = replace(searched, evaluator=other)
    products = replace(searched, products=tuple(replace(p, experts=()) for p in searched.products))
    uniform = {f: in_one_format(searched, f).solve("bytes") for f in formats}
    sizes = [pick.bytes for pick in uniform.values() if pick is not None]
    rooms = sorted({*sizes, *(sum(pair) // 2 for pair in pairwise(sizes))}, reverse=True)
    print(
        f"as it is: {searched.rest + sum(p.options[0].bytes for p in searched.products):,} bytes,"
    )
    print(f"perplexity {other.origin.perplexity:.3f}\n")
    print("| bytes | one format | formats of products | formats of experts |\n|---|---|---|---|")
    for room in rooms:
        alone = [pick for pick in uniform.values() if pick is not None and pick.bytes == room]
        picks = [q.solve("damage", bytes=room) for q in (products, searched)]
        cells = [measured(searched, pick) for pick in (*(alone or [None]), *picks)]
        print(f"| {(searched.rest + room) / 1e6:.2f} MB | {' | '.join(cells)} |", flush=True)


def measured(searched: ChoiceSearch, pick: SolvedChoice | None) -> str:
    """Perplexity, and the divergence from the model as it is."""
    if pick is None:
        return ""
    distance = searched.measured(pick).distance
    return f"{distance.perplexity:.2f}, KL {distance.kl:.2e}"


if __name__ == "__main__":
    main()
