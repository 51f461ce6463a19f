"""Compile a checkpoint, see what was recognised, run it, save it, load it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

import moec

checkpoint = Path(__file__).resolve().parent / "tiny_moe" / "checkpoint"
model = moec.compile(checkpoint)

for block in model.blocks:
    print(f"{block.name}: {block.experts} experts, {block.top_k} for each token, {block.router}")

# One compiled model takes every batch and every sequence length.
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
for text in ("import", "class Stack:\n    def push(self, item):\n        self.items."):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    likeliest = model(ids)[0, -1].argmax()
    print(f"{text!r} goes on with {tokenizer.decode(likeliest)!r}")

# The artifact needs neither torch nor a compiler. numpy goes in, numpy comes out.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tiny_moe.moec"
    model.save(path)
    loaded = moec.load(path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(torch.from_numpy(loaded(ids.numpy())), model(ids).float())
