"""Compile a checkpoint, print what was recognised, run it, save it, and load it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

import moec

checkpoint = Path(__file__).resolve().parent / "tiny_moe" / "checkpoint"
model = moec.compile(checkpoint)

for block in model.blocks:
    print(f"{block.name}: {block.experts} experts, {block.top_k} for each token, {block.router}")

# One compiled model supports every batch size and sequence length.
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
for text in ("import", "class Stack:\n    def push(self, item):\n        self.items."):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    likeliest = model(ids)[0, -1].argmax()
    print(f"{text!r} goes on with {tokenizer.decode(likeliest)!r}")

# The artifact needs neither torch nor a compiler. Inputs and outputs are numpy arrays.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tiny_moe.moec"
    model.save(path)
    loaded = moec.load(path)
    ids = np.array([[1, 2, 3]])
    logits = loaded(ids)
    assert np.array_equal(logits.astype(np.float32), model(torch.from_numpy(ids)).float())
    print(f"loaded {path.name}: {logits.dtype}{list(logits.shape)}, the same numbers")
