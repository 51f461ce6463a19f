"""A small Switch Transformer that writes Python, to measure compression on.

    python -m benchmarks.models.switch [--steps 1600] [--out FOLDER]

A decoder of LAYERS layers whose feed-forward networks have EXPERTS experts each. The router chooses
one expert per token: two matrices with a ReLU between them, and the result is multiplied by the
router's probability (Switch, arXiv 2101.03961: equations 1 and 2, the balancing loss of equations 4
to 6, and the small initial weights of its section 2.4). QMoE compresses models of this kind (arXiv
2310.16795): many experts, each rarely used, trained without weight decay. The model is trained on
the text of examples/tiny_moe, with its tokenizer and its split of Python's standard library. Steps
and seed are fixed; the result is stored in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe"
FOLDER = Path(tempfile.gettempdir()) / "moec-switch"
WORDS, WIDTH, INNER, HEADS, LAYERS, EXPERTS, LENGTH = 1024, 128, 512, 4, 4, 32, 256
STEPS, BATCH, RATE, BALANCE = 1600, 8, 3e-3, 0.01
SPREAD = 0.1
"""The variance of initial weights, times the width of their input."""


class Expert(nn.Module):
    """x [.., WIDTH] -> [.., WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER, False), nn.Linear(INNER, WIDTH, False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.relu(self.up(x)))
        return result


class Switch(nn.Module):
    """x [B, S, WIDTH] -> [B, S, WIDTH]. `imbalance` is the balancing loss of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.imbalance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        shares = self.router(rows).softmax(-1)
        weights, chosen = shares.topk(1, dim=-1)
        if self.training:
            used = torch.bincount(chosen.flatten(), minlength=EXPERTS) / len(rows)
            self.imbalance = EXPERTS * (used * shares.mean(0)).sum()
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            y = y.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return y.reshape(x.shape)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH, False), nn.Linear(WIDTH, WIDTH, False)
        self.switch = Switch()

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        mixed = self.mix(self.before(x)).view(b, s, 3, HEADS, WIDTH // HEADS)
        q, k, v = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, WIDTH))
        result: Tensor = x + self.switch(self.between(x))
        return result


class Decoder(nn.Module):
    """Token ids i64[B, S], S at most LENGTH -> scores of the next token [B, S, WORDS]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = math.sqrt(SPREAD / module.in_features)
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(self.norm(x))
        return result


def tiny_train() -> Any:
    """examples/tiny_moe/train.py as a module: its split of the text, its batches and learning
    rates."""
    spec = importlib.util.spec_from_file_location("tiny_moe_train", TINY / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(steps: int, say: Any = print) -> Decoder:
    """A trained model in bfloat16."""
    torch.manual_seed(0)
    model, tiny = Decoder(), tiny_train()
    tokenizer = AutoTokenizer.from_pretrained(TINY / "checkpoint")
    ids = tiny.encode(tokenizer.backend_tokenizer, tiny.standard_library()[0])
    adam = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0, fused=True
    )
    stream = tiny.batches(ids, BATCH, LENGTH, seed=0)
    recent, start = 0.0, time.monotonic()
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = RATE * tiny.rate_at(step / steps)
        batch = next(stream)
        loss = tiny.cross_entropy(model(batch), batch)
        uneven = torch.stack([layer.switch.imbalance for layer in model.layers]).sum()
        (loss + BALANCE * uneven).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if not math.isfinite(recent):
            raise SystemExit(f"the loss became {recent} at step {step}")
        if step % 50 == 49:
            speed = (step + 1) * BATCH * LENGTH / (time.monotonic() - start)
            say(f"step {step + 1:5d}  loss {recent:.3f}  {speed:.0f} tokens/s", flush=True)
    return model.to(torch.bfloat16).eval()


def trained(folder: Path = FOLDER, steps: int = STEPS) -> Decoder:
    """The model stored in the folder; if there is none, it is trained and stored."""
    file = folder / f"switch-{steps}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(train(steps).state_dict(), file)
    model = Decoder().to(torch.bfloat16).eval()
    model.load_state_dict(load_file(file))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trained(options.out, options.steps)


if __name__ == "__main__":
    main()
