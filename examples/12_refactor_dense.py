"""A dense model becomes experts for code and for prose, with one router before all its layers.

A small model learns the bytes of Python's standard library and of its manual. Then channels are
chosen for both domains on calibration text (Read-ME, arXiv 2410.19123). Channels that both domains
keep are used by every token; the others are used by tokens that the router sends to their domain.
Perplexity is measured on text that is neither training nor calibration data, also for channels
chosen at random.

    python examples/12_refactor_dense.py             # seconds
    python examples/12_refactor_dense.py --train     # and some steps of training afterwards

benchmarks/approximation/refactor_dense.py does the same with SmolLM2-135M.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.passes.approximate.refactor_dense import RefactorDense

D, HEADS, HIDDEN, LAYERS, LENGTH = 64, 4, 192, 2, 64
STEPS, BATCH, RATE = 80, 16, 3e-3
KEPT = (0.5, 0.25)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(D) for _ in range(2))
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate, self.up = nn.Linear(D, HIDDEN, bias=False), nn.Linear(D, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, D))
        n = self.norms[1](x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Model(nn.Module):
    """ids [B, S] -> scores [B, S, 128]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(128, D), nn.Embedding(LENGTH, D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(D, 128, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def windows(text: str, count: int) -> dict[str, Tensor]:
    """i64[count, LENGTH] bytes, evenly spaced over a text."""
    data = torch.tensor(list(text.encode("ascii", "replace"))).long()
    starts = torch.linspace(0, len(data) - LENGTH, count).long()
    return {"ids": torch.stack([data[start : start + LENGTH] for start in starts])}


def domains(files: tuple[str, ...], first: int, count: int) -> dict[str, dict[str, Tensor]]:
    root = Path(sysconfig.get_path("stdlib"))
    code = "\n".join((root / name).read_text(encoding="utf-8") for name in files)
    prose = "\n".join(topics[name] for name in sorted(topics)[first::2])
    return {"code": windows(code, count), "prose": windows(prose, count)}


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, ids: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = ids[torch.randint(len(ids), (BATCH,))]
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def row(name: str, model: nn.Module, texts: Mapping[str, Mapping[str, Tensor]]) -> None:
    with torch.no_grad():
        result = [loss(model, text["ids"]).exp().item() for text in texts.values()]
    print(f"{name:30}" + "".join(f"{value:8.2f}" for value in result), flush=True)


torch.manual_seed(0)
learnt = domains(("argparse.py", "tarfile.py", "ast.py"), 0, 512)
calib = domains(("logging/__init__.py",), 0, 16)
held_out = domains(("http/client.py", "urllib/parse.py"), 1, 64)
model, example = Model(), learnt["code"]["ids"][:2, :7]
everything = torch.cat([text["ids"] for text in learnt.values()])
train(model, everything, STEPS, RATE)

print(f"{'perplexity of':30}{'code':>8}{'prose':>8}")
row("dense", model.eval(), held_out)
for keep in KEPT:
    for by in ("random", "activation"):
        pass_ = RefactorDense(keep=keep, by=by, width=32, steps=40)
        program = moec.transform(model, [pass_], (example,), calib=calib)
        row(f"{keep:.0%} of channels, by {by}", program, held_out)
for line in program.transformation.damage[0].layers:
    print(f"{line.layer}: {line.says}")
if "--train" in sys.argv:
    train(program, everything, STEPS, RATE / 3)
    row(f"the last, after {STEPS} steps", program, held_out)
    train(model.train(), everything, STEPS, RATE / 3)
    row("dense, after as many", model.eval(), held_out)
