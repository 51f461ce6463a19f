"""The committed checkpoint has the properties in its README: small, trained, all experts used."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe" / "checkpoint"
TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def train():
    """examples/tiny_moe/train.py as a module."""
    path = CHECKPOINT.parent / "train.py"
    spec = importlib.util.spec_from_file_location("tiny_moe_train", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_size():
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 8e6


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_tokenizer_gives_any_text_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_it_is_trained_and_uses_every_expert(train):
    """An untrained model loses ln(1024) = 6.9 nats per token; this one 2.9 on held-out text."""
    held_out = Path(sysconfig.get_path("stdlib"), "http", "client.py").read_text(encoding="utf-8")
    ids = np.asarray(TOKENIZER.encode(held_out).ids, dtype=np.int32)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    result = train.quality(model, train.Text(ids, ids, len(held_out.encode())), 256, windows=8)
    assert result.loss < 3.3
    assert result.share.min() > 0.04  # an even share is 0.125
    assert result.share.max() < 0.3


def test_training_learns(train):
    """Thirty steps on one repeated line halve the loss, by a clock that ticks once a step."""
    torch.manual_seed(0)
    config = train.configuration(1024, 0)
    config.num_hidden_layers = 1
    model = train.Qwen3MoeForCausalLM(config)
    ids = np.tile(np.arange(7, 40, dtype=np.int32), 40)
    text = train.Text(ids, ids, len(ids))
    before = train.quality(model, text, 32, windows=4).loss
    ticks = itertools.count()
    steps, _ = train.train(
        model, text, seconds=31, batch=4, length=32, rate=3e-3, seed=0, clock=lambda: next(ticks)
    )
    assert steps == 30
    assert train.quality(model, text, 32, windows=4).loss < before / 2
    assert train.rate_at(1.0) == pytest.approx(0.03)
