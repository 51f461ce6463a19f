"""Perplexity against memory for pruned, merged and averaged experts, by criterion, as a table.

    python -m benchmarks.approximation.curves [--models tiny_moe,smollm2] [--budget "kl<=0.1"]
        [--plot FILE.png] [--append FILE.md]

tiny_moe is examples/tiny_moe, smollm2 the upcycled model of benchmarks/models/upcycle.py (four of
its 30 layers have experts). Experts are chosen on one file of Python's standard library; perplexity
is measured on two others, which neither model was trained on here. Layers are changed one after the
other, by the statistics of each in the original model.

The last columns keep half of the experts under a budget, which is checked layer by layer on the
data that experts are chosen on; a layer that would exceed it is not changed. The run fails if a
model exceeds its budget in the end. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import moec
from benchmarks.approximation.printed import Say, add_append_option, printed
from benchmarks.models.smollm2 import load
from benchmarks.models.upcycle import EXPERTS, LAYERS, K, upcycle
from moec.errors import NoMatch
from moec.ir.graph import Program, Stage
from moec.ir.stats import stored_bytes
from moec.passes.approximate.average_experts import AverageExperts
from moec.passes.approximate.merge_experts import MergeExperts
from moec.passes.approximate.prune_experts import PruneExperts
from moec.passes.calibration.budget import parse_budget
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator, LayerStats
from moec.passes.calibration.session import (
    Approximate,
    CalibrationSession,
    MeasuredPass,
    NeedsGlobalStats,
)
from moec.passes.core.moe_layer import Layer, layer_of
from moec.passes.core.runner import run

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "checkpoint"
SEEN = ("argparse.py",)
HELD_OUT = ("http/client.py", "urllib/parse.py")  # as in the split of examples/tiny_moe/train.py
KEPT = (0.75, 0.5, 0.375)
ASKED = 0.5  # under the budget
SCOPES = ("layer", "global")
CRITERIA = ("usage", "reap", "error", "random")

Tokens = dict[str, torch.Tensor]


@dataclass
class Case:
    """A model with its blocks recognised, and the tokens that it is measured on."""

    name: str
    program: Program
    train: Tokens
    held_out: Tokens
    notes: str = ""
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    budgeted: dict[str, tuple[float, float]] = field(default_factory=dict)


def windows(tokenizer: Any, files: Sequence[str], count: int, length: int) -> Tokens:
    """i64[count, length] token ids, evenly spaced over the text of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in files)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, count).long()
    return {"input_ids": torch.stack([ids[start : start + length] for start in starts])}


def recognised(model: Any, *example: Any, **options: Any) -> Program:
    compiled = moec.compile(model, *example, stop_after="split-packed", **options)
    return compiled.pass_results[-1].program


def tiny_moe() -> Case:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    train, held_out = (windows(tokenizer, files, 8, 256) for files in (SEEN, HELD_OUT))
    return Case("tiny_moe", recognised(CHECKPOINT), train, held_out)


def smollm2() -> Case:
    model, tokenizer = load()
    train, held_out = (windows(tokenizer, files, 2, 160) for files in (SEEN, HELD_OUT))

    def perplexity() -> float:
        ids = held_out["input_ids"]
        with torch.no_grad():
            return float(model(ids, labels=ids).loss.exp())

    before = perplexity()
    errors = upcycle(model, tokenizer)
    notes = (
        f"layers {', '.join(map(str, LAYERS))} of 30 with {EXPERTS} experts, top-{K}, which miss "
        f"the dense MLP's output by {', '.join(f'{error:.2f}' for error in errors)}; perplexity "
        f"{before:.2f} before"
    )
    return Case("smollm2", recognised(model, (train["input_ids"],)), train, held_out, notes)


def changed(case: Case, pass_: Approximate, layers: Sequence[tuple[Layer, LayerStats]]) -> Program:
    """The program after a pass without a budget; a layer that keeps all experts is unchanged."""
    inner = pass_.planned(case.program, layers) if isinstance(pass_, NeedsGlobalStats) else pass_
    program = case.program
    for layer, stats in layers:
        with suppress(NoMatch):
            program = inner.change(program, layer, stats).program
    return program


def ways() -> dict[str, dict[float, Approximate]]:
    """The curves: a pass for each share of the experts that is kept."""
    result: dict[str, dict[float, Approximate]] = {
        f"prune by {by}, {scope}": {k: PruneExperts(keep=k, by=by, scope=scope) for k in KEPT}
        for by in CRITERIA
        for scope in SCOPES
    }
    result["merge"] = {k: MergeExperts(keep=k) for k in KEPT}
    result["average, to one"] = {ASKED: AverageExperts()}
    return result


def measure(case: Case, limit: str, say: Say) -> bool:
    """Prints the table of one model. Returns whether all budgeted runs stayed within their
    budget."""
    start = time.perf_counter(), time.process_time()
    graph = case.program.graph
    layers = [layer_of(graph, op) for op in graph.ops if op.name == "moe.experts"]
    calib = load_calibration(case.train, case.program, {})
    chooser = Evaluator(case.program, calib, {layer.output: layer for layer in layers})
    observed = list(zip(layers, chooser.layer_stats(case.program, layers), strict=True))
    evaluator = Evaluator(case.program, load_calibration(case.held_out, case.program, {}))
    allowed = parse_budget(limit)

    def point(program: Program) -> tuple[float, float]:
        perplexity = evaluator.measure(program)[0].perplexity
        assert perplexity is not None
        return stored_bytes(program) / 1e6, perplexity

    full = point(case.program)
    say(f"{case.name}: {len(layers)} layers of {layers[0].count} experts{case.notes and '; '}"
          f"{case.notes}")  # fmt: skip
    say(
        f"chosen on {chooser.tokens} tokens of {', '.join(SEEN)}, "
        f"perplexity on {evaluator.tokens} of "
        f"{', '.join(HELD_OUT)}; whole: {full[0]:.2f} MB, perplexity {full[1]:.2f}"
    )
    shares = "".join(f"{remaining:>17.1%}" for remaining in KEPT)
    say(f"{'':22}{shares}    {ASKED:.0%} asked for, {allowed}")
    say(f"{'':22}" + "       MB  perpl." * len(KEPT) + "       MB  perpl.      kl  layers")
    inside = True
    for name, passes in ways().items():
        result = {
            remaining: point(changed(case, pass_, observed)) for remaining, pass_ in passes.items()
        }
        case.points[name] = [full, *result.values()]
        pass_ = MeasuredPass(passes[ASKED], CalibrationSession(case.train, {}, allowed))
        step = run(case.program, [pass_], stage=Stage.MOE)[-1]
        assert step.damage is not None
        after = step.damage.after
        inside &= not allowed.breach(after)
        case.budgeted[name] = point(step.program)
        cells = [
            f"{result[k][0]:9.2f}{result[k][1]:8.2f}" if k in result else " " * 17 for k in KEPT
        ]
        done = sum(not line.undone for line in step.damage.layers)
        megabytes, perplexity = case.budgeted[name]
        say(
            f"{name:22}{''.join(cells)}{megabytes:9.2f}{perplexity:8.2f}{after.kl:8.3f}"
            f"{done:5} of {len(layers)}"
        )
    say(
        f"every budgeted run ended inside its budget: {'yes' if inside else 'NO'}; "
        f"{time.perf_counter() - start[0]:.0f} s, {time.process_time() - start[1]:.0f} s of CPU\n"
    )
    return inside


def plot(cases: Sequence[Case], path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    figure, axes = plt.subplots(1, len(cases), figsize=(6 * len(cases), 5), squeeze=False)
    for position, case in zip(axes[0], cases, strict=True):
        for i, (name, points) in enumerate(case.points.items()):
            colour = f"C{i // 2}" if i < 2 * len(CRITERIA) else f"C{i - len(CRITERIA)}"
            style = "--" if "global" in name else "-"
            position.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=name)
            position.plot(*case.budgeted[name], "x", color=colour)
        position.set(
            title=case.name, xlabel="MB of weights", ylabel="perplexity (x: within the budget)"
        )
        position.set_yscale("log")
        position.yaxis.set_major_formatter(plain)
        low, high = position.get_ylim()
        if high < 10 * low:  # no two powers of ten: the marks between them need numbers
            position.yaxis.set_minor_formatter(plain)
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny_moe,smollm2")
    parser.add_argument("--budget", default="kl<=0.1")
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG file")
    add_append_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    title = "Perplexity against memory: pruned, merged and averaged experts"
    with printed(title, "benchmarks.approximation.curves", options.append) as say:
        return compare(options, say)


def compare(options: argparse.Namespace, say: Say) -> int:
    reference = {"tiny_moe": tiny_moe, "smollm2": smollm2}
    cases, inside = [], True
    for name in options.models.split(","):
        cases.append(reference[name]())
        inside &= measure(cases[-1], options.budget, say)
    if options.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            say("no picture: matplotlib is not installed")
        else:
            plot(cases, options.plot)
    return 0 if inside else 1


if __name__ == "__main__":
    sys.exit(main())
