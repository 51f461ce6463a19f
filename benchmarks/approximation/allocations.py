"""Which experts get how many bits: moec's choices beside one format for all, random choices and
choices by frequency, at equal bytes, on held-out text.

    python -m benchmarks.approximation.allocations [--model tiny_moe|smollm2] [--windows 32]
        [--fitted 16] [--record FILE.jsonl]

smollm2 is that of benchmarks/models/upcycle.py. Codes are by GPTQ where a row does not say
"nearest"; docs/benchmarks/allocations.md explains the columns.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.approximation.compress import FITTED_ON, LENGTH
from benchmarks.approximation.curves import CHECKPOINT, HELD_OUT, windows
from benchmarks.models.upcycle import EXPERTS
from benchmarks.models.upcycle import stored as upcycled
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.ir.graph import Op
from moec.optimise.evaluation.estimate import Estimate
from moec.optimise.optimisation.optimize import search
from moec.optimise.optimisation.pareto import in_one_format
from moec.optimise.optimisation.search import ChoiceSearch
from moec.optimise.optimisation.solve import SolvedChoice
from moec.passes.approximate.choices.model_choices import ProductChoice
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.core.runner import Log
from moec.passes.quantise.codes import Codes
from moec.passes.quantise.fixed_formats import FixedFormats, named_products
from moec.passes.quantise.gptq_codes import calibrate, rows_of, stored

FORMATS = ("int2:64", "int2:32", "int3:64", "int3:32", "int4:64", "int4:32", "int8")
TARGETS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
MORE = ("multiprocessing/managers.py", "multiprocessing/synchronize.py", "idlelib/run.py",
        "poplib.py", "site.py", "tkinter/simpledialog.py", "types.py")  # fmt: skip
"""Held out in examples/tiny_moe/train.py, as are those of HELD_OUT."""


@dataclass(eq=False)
class Case:
    """The costs of the products of experts; these, and on the calibration text the rows of each
    expert, by name; the held-out text; GPTQ's codes of all experts of a matrix, by its format."""

    searched: ChoiceSearch
    ops: Mapping[str, Op]
    rows: Mapping[str, Sequence[Tensor]]
    held_out: Evaluator
    codes: dict[Any, Any] = field(default_factory=dict)


def load(name: str, fitted: int, held: int) -> Case:
    model, tokenizer = str(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    args: tuple[Any, ...] = ()
    if name == "smollm2":
        model, tokenizer = upcycled()
        args = (torch.zeros(2, LENGTH, dtype=torch.int64),)
    text = windows(tokenizer, FITTED_ON, fitted, LENGTH)
    moves, pin = ("formats", "expert-formats"), {"*_proj": "unchanged"}
    searched = search(model, args, calib=text, formats=FORMATS, moves=moves, pin=pin)
    products = tuple(p for p in searched.products if p.experts)
    program, data = searched.evaluator.original, searched.evaluator.calibration
    ops = {p.name: named_products(program.graph)[p.name] for p in products}
    rows_by_op = dict(rows_of(program, data, ops.values()))
    rows = {name: rows_by_op[op] for name, op in ops.items()}
    text = windows(tokenizer, (*HELD_OUT, *MORE), held, LENGTH)
    held_out = Evaluator(program, load_calibration(text, program, {}))
    return Case(replace(searched, products=products, layers={}), ops, rows, held_out)


def losses(case: Case, pick: SolvedChoice, *, nearest: bool = False) -> tuple[Tensor, Tensor]:
    """Nats and divergence of each held-out window's tokens after the first, summed: f64[W]."""
    evaluator, memory = case.held_out, case.searched.compiled.source.memory
    pass_, codes = FixedFormats(pick.formats), Codes(evaluator.original, memory)
    for name, chosen in ({} if nearest else pass_.formats).items():
        for format, experts in pass_.parts(case.ops[name], chosen):
            for key in ((matrix.name, format) for matrix in stored(case.ops[name])):
                if key not in case.codes:
                    weight = evaluator.original.weights[key[0]]
                    ((case.codes[key], _),) = calibrate(format, {key[0]: weight}, case.rows[name])
                every, part = case.codes[key], list(experts) or slice(None)
                few = replace(every, codes=every.codes[part], scales=every.scales[part])
                codes.calibrated[(*key, experts)] = few
    program = pass_.rounded(evaluator.original, Log(memory=memory), codes)
    assert evaluator.text is not None
    (i, o), each = evaluator.text, list[Tensor]()
    cases, results = evaluator.calibration.cases, evaluator.results
    for ids, out, right in zip(cases, evaluator.run(program, ()), results, strict=True):
        q, p = (logits[o][:, :-1].log_softmax(-1) for logits in (out, right))
        nats, kl = -q.gather(-1, ids[i][:, 1:, None])[..., 0], (p.exp() * (p - q)).sum(-1)
        each.append(torch.stack([nats, kl]).double().sum(-1))
    nats, kl = torch.cat(each, 1)
    return nats, kl


def filled(searched: ChoiceSearch, room: int, worth: Callable[..., float]) -> ChoiceSearch:
    """From the fewest bits on, the expert of the greatest worth gets the next more that fit."""
    ladders = {
        (p.name, e): sorted(options, key=lambda option: option.bytes)
        for p in searched.products
        for e, options in enumerate(p.experts)
    }
    left = room - sum(ladder[0].bytes for ladder in ladders.values())
    more = {k: ladder[1].bytes - ladder[0].bytes for k, ladder in ladders.items()}
    while able := [key for key, size in more.items() if 0 < size <= left]:
        key = max(able, key=lambda key: worth(*key, *ladders[key][:2]))
        left -= more[key]
        ladder = ladders[key] = ladders[key][1:]
        more[key] = ladder[1].bytes - ladder[0].bytes if ladder[1:] else 0
    each = ((p, [ladders[p.name, e][:1] for e in range(len(p.experts))]) for p in searched.products)
    products = tuple(replace(p, options=(), experts=tuple(map(tuple, few))) for p, few in each)
    return replace(searched, products=products)


def ways(case: Case, room: int) -> Iterator[tuple[str, ChoiceSearch]]:
    """What is left to choose, first everything."""

    def frequency(name: str, e: int, old: ProductChoice, new: ProductChoice) -> float:
        """The squared error of 2^-bits that goes, for each byte, as often as it is chosen."""
        weights = old.rows * old.columns * len(stored(case.ops[name]))
        before, after = (4.0 ** (-8 * option.bytes / weights) for option in (old, new))
        return float(len(case.rows[name][e]) * (before - after) / (new.bytes - old.bytes))

    yield "moec, experts", case.searched
    products = tuple(replace(p, experts=()) for p in case.searched.products)
    yield "moec, products", replace(case.searched, products=products)
    yield "frequency", filled(case.searched, room, frequency)
    for seed in range(3):
        order = random.Random(seed)
        yield f"random, seed {seed}", filled(case.searched, room, lambda *_, o=order: o.random())


def table(case: Case) -> Iterator[dict[str, Cell]]:
    weights = case.held_out.original.weights
    count = sum(weights[m.name].numel() for op in case.ops.values() for m in stored(op))
    picks = {f: in_one_format(case.searched, f).solve("bytes") for f in FORMATS}
    alone = {format: pick for format, pick in picks.items() if pick}
    sizes = [pick.bytes for pick in alone.values()]
    uniform = cache(lambda f, how: (alone[f], *losses(case, alone[f], nearest=bool(how))))
    for bits in TARGETS:
        room = int(bits * count / 8)
        picks = {name: s.solve("damage", bytes=room) for name, s in ways(case, room)}
        here = {name: (pick, *losses(case, pick)) for name, pick in picks.items() if pick}
        near = max(s for s in sizes if s <= room), min(s for s in sizes if s >= room)
        formats = [format for format, pick in alone.items() if pick.bytes in near]
        here |= {f"all {f}{how}": uniform(f, how) for f in formats for how in (", nearest", "")}
        for name, (pick, nats, kl) in here.items():
            yield {
                "asked": bits,
                "choice": name,
                "bits": round(8 * pick.bytes / count, 2),
                "perplexity": round(float((nats.mean() / (LENGTH - 1)).exp()), 3),
                "more nats": shown(nats - here["moec, experts"][1]),
                "KL": round(float(kl.mean() / (LENGTH - 1)), 5),
                "more KL": shown(kl - here["moec, experts"][2]),
            }


def shown(sums: Tensor) -> str:
    more = Estimate.of(sums.tolist(), [LENGTH - 1] * len(sums))
    star = " *" if abs(more.mean) > 2 * more.error else ""
    return f"{more.mean:+.5f} ± {more.error:.5f}{star}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("tiny_moe", "smollm2"), default="tiny_moe")
    parser.add_argument("--windows", type=int, default=32, help="of 256 tokens, held out")
    parser.add_argument("--fitted", type=int, default=16, help="of 256 tokens, for calibration")
    add_record_options(parser, "AMD EPYC, Zen 4")
    options = parser.parse_args()
    case, rows = load(options.model, options.fitted, options.windows), list[dict[str, Cell]]()
    for row in table(case):
        rows.append(row)
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    name = "tiny_moe" if options.model == "tiny_moe" else f"smollm2, {EXPERTS} experts"
    conditions = (
        f"{options.windows} held-out windows of {LENGTH} tokens, chosen on {options.fitted} of "
        f"other files; with weights as they are {case.held_out.origin.perplexity:.3f}"
    )
    record_if_asked(options, "allocations", name, rows, conditions)


if __name__ == "__main__":
    main()
