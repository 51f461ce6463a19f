"""Experts without a network. A small MoE++ model is trained and compiled. Then such experts are
added to tiny_moe, which was trained without them, for its least important choices.

    python examples/07_zero_experts.py [--plot FILE.png]    # the plot needs matplotlib
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from training.zero_experts import MoEPlusPlus
from transformers import AutoTokenizer

import moec
from moec.ir.graph import Stage
from moec.passes.approximate.insert_zero_experts import InsertZeroExperts
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.calibration.session import CalibrationSession, MeasuredPass
from moec.passes.core.runner import run

CHECKPOINT = Path(__file__).resolve().parent / "tiny_moe" / "checkpoint"
FRACTIONS = (0.1, 0.25, 0.5)
LENGTH = 128


class Model(nn.Module):
    """Two layers; the router of the second also reads the scores of the first. x[T, D] -> [T,
    D]."""

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoEPlusPlus(16, 32, networks=4, tau=tau) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor | None = None
        for layer in self.layers:
            y, logits = layer(x, logits)
            x = x + y
        return x


print("trained with tau: share of choices for networks, and what theory expects")
for tau in (0.25, 1.0):
    torch.manual_seed(0)
    model = Model(tau)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        x = torch.randn(256, 16)
        wrong = (model(x) - torch.where(x[:, :1] > 0, x.flip(1), x)).square().mean()
        loss = wrong + 2 * (model.layers[0].loss + model.layers[1].loss)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    compiled = moec.compile(model, (torch.randn(9, 16),))
    x = torch.randn(512, 16)
    with torch.no_grad():
        ids = model.layers[0](x)[1].topk(2).indices
        off = float((compiled(x) - model(x)).abs().max())
    share, theory = float((ids < 4).float().mean()), tau * 4 / (tau * 4 + 4)
    print(f"  {tau:4}: {share:.2f} ({theory:.2f}); compiled, it differs by {off:.0e} at most")
for block in compiled.blocks:
    print(f"  {block.name}: {block.top_k} of {block.experts} experts and {block.zero}")

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)


def windows(files: Sequence[str]) -> dict[str, Tensor]:
    """i64[4, LENGTH] token ids, evenly spaced over files of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in files)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - LENGTH, 4).long()
    return {"input_ids": torch.stack([ids[start : start + LENGTH] for start in starts])}


train, held_out = windows(["argparse.py"]), windows(["http/client.py", "urllib/parse.py"])
captured = moec.compile(CHECKPOINT, stop_after="split-packed")
original = captured.pass_results[-1].program
evaluator = Evaluator(original, load_calibration(held_out, original, {}))
print(f"\ntiny_moe, on text that it never saw: perplexity {evaluator.origin.perplexity:.1f}")
print("without training, choices that take no row: KL in nats a token, perplexity")
print("  " + "".join(f"{fraction:>16.0%}" for fraction in FRACTIONS))
remaining: dict[str, list[float]] = {}
for by in ("best", "zero"):
    cells = ""
    for fraction in FRACTIONS:
        pass_ = InsertZeroExperts(way="calibrated", fraction=fraction, by=by)
        measured = MeasuredPass(pass_, CalibrationSession(train, {}))
        changed = run(original, [measured], stage=Stage.MOE)[-1].program
        distance, _, _ = evaluator.measure(changed)
        assert distance.kl is not None
        remaining.setdefault(by, []).append(distance.kl)
        cells += f"{distance.kl:9.3f}{distance.perplexity:7.1f}"
    print(f"  {cells}  {'nothing' if by == 'zero' else 'the best stand-in'} instead")

parser = argparse.ArgumentParser()
parser.add_argument("--plot", type=Path)
if path := parser.parse_args().plot:
    from matplotlib import pyplot

    for by, values in remaining.items():
        pyplot.plot(FRACTIONS, values, marker="o", label=by)
    pyplot.xlabel("share of choices that take no row")
    pyplot.ylabel("KL, nats a token")
    pyplot.legend(title="instead of experts")
    pyplot.savefig(path)
    print(f"wrote {path}")
