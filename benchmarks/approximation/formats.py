"""Formats that `moec optimize` chooses beside one format for all products, at the same bytes.

python -m benchmarks.approximation.formats examples/tiny_moe/checkpoint --calib TEXT.txt
"""

from __future__ import annotations

import argparse

import moec
from moec.formats.notation import Format, parse
from moec.ir.graph import Program
from moec.optimisation.sensitivity import (
    StoredProduct,
    damage_of,
    formats_of,
    measure_products,
)
from moec.optimisation.solve import least_damage
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.core.runner import Log
from moec.passes.quantise.fixed_formats import FixedFormats

UNIFORM = ("int8", "int4:32", "int4:128")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    options = parser.parse_args()
    compiled = moec.compile(options.model, quant="none", build=False)
    program = compiled.pass_results[-1].program
    data = load_calibration(options.calib, program, compiled.source.files)
    evaluator = Evaluator(program, data)
    formats = tuple(map(parse, UNIFORM))
    products = measure_products(program, evaluator, formats, Log())
    print("| bytes | all in one format | KL | chosen | KL | predicted |\n|---|---|---|---|---|---|")
    budgets = {str(f): uniform_bytes(products, f) for f in formats}
    for name, room in budgets.items():
        pick = least_damage(products, room)
        assert pick is not None
        same = {p.name: parse(name) for p in products}
        chosen = formats_of(products, pick.options)
        counts = ", ".join(f"{sum(str(f) == u for f in chosen.values())} {u}" for u in UNIFORM)
        kl = measure(program, evaluator, same), measure(program, evaluator, chosen)
        print(
            f"| {room / 1e6:.2f} MB | {name} | {kl[0]:.2e} | {counts} | {kl[1]:.2e} | "
            f"{pick.damage:.2e} |"
        )


def uniform_bytes(products: tuple[StoredProduct, ...], format: Format) -> int:
    return sum(o.bytes for p in products for o in p.options if o.format == format)


def measure(program: Program, evaluator: Evaluator, formats: dict[str, Format]) -> float:
    changed = FixedFormats(formats).run(program, Log())
    return damage_of(evaluator.measure(changed)[0])


if __name__ == "__main__":
    main()
