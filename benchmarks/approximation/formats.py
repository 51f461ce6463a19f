"""What `moec optimize` chooses beside one format for all products, at the same bytes: formats only,
and formats with fewer experts.

python -m benchmarks.approximation.formats examples/tiny_moe/checkpoint --calib TEXT.txt
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from moec.optimise.optimisation.optimize import FORMATS, search
from moec.optimise.optimisation.pareto import in_one_format
from moec.optimise.optimisation.search import ChoiceSearch
from moec.optimise.optimisation.sensitivity import damage_of
from moec.optimise.optimisation.solve import SolvedChoice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    options = parser.parse_args()
    searched = search(options.model, calib=options.calib, moves=("formats", "prune"))
    alone = replace(searched, layers={name: s[:1] for name, s in searched.layers.items()})
    print("| bytes | choice | KL | predicted |\n|---|---|---|---|")
    for format in FORMATS:
        uniform = in_one_format(searched, format).solve("bytes")
        assert uniform is not None
        row(searched, format, uniform)
        for moves in (alone, searched):
            pick = moves.solve("damage", bytes=uniform.bytes)
            assert pick is not None
            row(searched, describe(pick), pick)


def row(searched: ChoiceSearch, name: str, pick: SolvedChoice) -> None:
    kl = damage_of(searched.measured(pick).distance)
    size = (searched.rest + pick.bytes) / 1e6
    print(f"| {size:.2f} MB | {name} | {kl:.2e} | {pick.damage:.2e} |", flush=True)


def describe(pick: SolvedChoice) -> str:
    formats = [option.format for option in pick.options.values()]
    counts = [f"{formats.count(format)} {format}" for format in dict.fromkeys(formats)]
    dropped = sum(setting.of - len(setting.experts) for setting in pick.settings.values())
    return ", ".join([*counts, *([f"{dropped} experts dropped"] if dropped else [])])


if __name__ == "__main__":
    main()
