"""Files for ONNX Runtime: a module of your own for any number of tokens, and text from a model.

Before a file gets its final name, it is run and compared with eager. The report has the difference,
and the share of tokens that chose the same experts. A language model's file takes past keys and
values and returns the present ones, so one file serves prompts and single tokens. The text is
generated with only ONNX Runtime and numpy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

import moec

CHECKPOINT = Path(__file__).parent / "tiny_moe" / "checkpoint"
PROMPTS = ["def read_lines(path):\n    ", "import", "for key, value in"]

Array = np.ndarray[Any, Any]


class Expert(nn.Module):
    """silu(gate(x)) * up(x), as in most models."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    """Each token goes to the two experts with the highest router probability."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        h = self.norm(x)
        weights, chosen = F.softmax(self.router(h), dim=-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            y = y.index_add(0, token, expert(h[token]) * weights[token, slot, None])
        return x + y


def padded(prompts: list[list[int]]) -> tuple[Array, Array]:
    """Token ids and mask [B, S]; padding is on the left, and 0 in both."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def generate(session: Any, prompts: list[list[int]], tokens: int) -> Array:
    """The most likely tokens after each prompt, [B, tokens]."""
    ids, mask = padded(prompts)
    past = {
        inputs.name: np.zeros((len(ids), inputs.shape[1], 0, inputs.shape[3]), np.float32)
        for inputs in session.get_inputs()
        if inputs.name.startswith("past_key_values.")
    }
    results = []
    for _ in range(tokens):
        feeds = {"input_ids": ids, "attention_mask": mask, **past}
        logits, *present = session.run(None, feeds)
        past = dict(zip(past, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        results.append(ids)
    return np.concatenate(results, axis=1)


torch.manual_seed(0)
model = Routed(width=64, hidden=128, experts=8).eval()
compiled = moec.compile(model, (torch.randn(33, 64),), build=False)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "routed.onnx"
    for options in ({"ep": "portable"}, {"ep": "cpu", "moe": "op"}):
        exported = compiled.export_onnx(path, **options)
        error, share = exported.errors["output"], min(exported.parity.values())
        form = "com.microsoft.MoE" if options.get("moe") == "op" else "standard operators"
        print(f"{form}: {exported.nodes} nodes, error {error:.1e}, {share:.0%} of the tokens agree")

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            for tokens in (1, 33, 500):  # any number of tokens is allowed
                x = torch.randn(tokens, 64)
                (y,) = session.run(None, {"x": x.numpy()})
                torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)
print("equal to eager for 1, 33 and 500 tokens")

compiled = moec.compile(CHECKPOINT, dtype="float32", build=False)
tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tiny_moe.onnx"
    exported = compiled.export_onnx(path)
    worst, share = max(exported.errors.values()), min(exported.parity.values())
    print(f"tiny_moe: {exported.nodes} nodes, error {worst:.1e}, {share:.0%} of the tokens agree")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    together = generate(session, prompts, tokens=24)
    for prompt, tokens, text in zip(prompts, together, PROMPTS, strict=True):
        assert np.array_equal(tokens, generate(session, [prompt], tokens=24)[0])
        print(f"\n{text}{tokenizer.decode(tokens.tolist())}")
