"""The cost of pruning, merging and averaging experts: perplexity against memory, by criterion.

The text is Python's standard library. Experts are chosen on one file that the model was trained on;
perplexity is measured on files that it was not trained on.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import moec
from moec.ir.graph import Program, Stage
from moec.ir.stats import stored_bytes
from moec.passes.approximate.average_experts import AverageExperts
from moec.passes.approximate.merge_experts import MergeExperts
from moec.passes.approximate.prune_experts import PruneExperts
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.calibration.session import Approximate, CalibrationSession, MeasuredPass
from moec.passes.core.runner import run

CHECKPOINT = Path(__file__).resolve().parent / "tiny_moe" / "checkpoint"
WINDOWS, LENGTH = 4, 256
SEEN = ("argparse.py",)
HELD_OUT = ("http/client.py", "urllib/parse.py")  # as in the split of examples/tiny_moe/train.py
KEPT = (0.75, 0.5, 0.25)

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)


def windows(files: Sequence[str]) -> dict[str, torch.Tensor]:
    """i64[WINDOWS, LENGTH] token ids, evenly spaced over the text of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in files)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - LENGTH, WINDOWS).long()
    return {"input_ids": torch.stack([ids[start : start + LENGTH] for start in starts])}


# A budget limits the loss of quality of a compilation; these options are the whole interface.
compiled = moec.compile(
    CHECKPOINT,
    passes="+prune-experts(keep=0.75,by=reap)",
    calib=windows(SEEN),
    budget="kl<=0.45",
    stop_after="prune-experts",
)
(damage,) = compiled.report().damage
for line in damage.layers:
    print(f"{line.layer}: {line.says}")
print(f"KL {damage.after.kl:.3f} of at most 0.45 nats a token\n")

# The same passes alone, on the recognised graph, without generating code.
original = next(step for step in compiled.pass_results if step.name == "split-packed").program
evaluator = Evaluator(original, load_calibration(windows(HELD_OUT), original, {}))


def held_out(program: Program) -> float:
    """Perplexity on text that the model was not trained on."""
    perplexity = evaluator.measure(program)[0].perplexity
    assert perplexity is not None
    return perplexity


def cut(pass_: Approximate) -> tuple[float, float]:
    """Megabytes and perplexity after a pass."""
    steps = run(
        original, [MeasuredPass(pass_, CalibrationSession(windows(SEEN), {}))], stage=Stage.MOE
    )
    return stored_bytes(steps[-1].program) / 1e6, held_out(steps[-1].program)


rows: dict[str, list[Approximate]] = {
    "prune by usage": [PruneExperts(keep=k, by="usage") for k in KEPT],
    "prune by reap": [PruneExperts(keep=k, by="reap") for k in KEPT],
    "prune at random": [PruneExperts(keep=k, by="random") for k in KEPT],
    "merge": [MergeExperts(keep=k) for k in KEPT],
}
print(f"perplexity on {', '.join(HELD_OUT)}; whole: {held_out(original):.1f}")
print(f"{'experts kept':16}" + "".join(f"{remaining:>10.0%}" for remaining in KEPT))
for name, passes in rows.items():
    results = [cut(pass_) for pass_ in passes]
    print(f"{name:16}" + "".join(f"{perplexity:10.1f}" for _, perplexity in results))
print(f"{'megabytes':16}" + "".join(f"{megabytes:10.2f}" for megabytes, _ in results))
megabytes, perplexity = cut(AverageExperts())
print(f"averaged into one dense layer each: {megabytes:.2f} MB, {perplexity:.1f}")
