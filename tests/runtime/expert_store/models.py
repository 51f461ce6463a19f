"""Small artifacts whose experts can stay on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moec
from tests.once import Once

LAYERS, EXPERTS = 2, 8
FORMATS = (None, "int8", "int4:32:asymmetric")
"""Of the weights of experts: 16-bit floats, and those with arrays of scales and of zeros."""


def artifact(once: Once, quant: str | None) -> Path:
    """A language model whose experts' weights have sizes that are no whole pages."""

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        config = OlmoeConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, num_experts=EXPERTS,
            num_experts_per_tok=2, vocab_size=100, max_position_embeddings=64, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        model = OlmoeForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.arange(10).reshape(1, 10)
        moec.compile(model, (ids,), store=True, quant=quant).save(folder / "model.moec")

    return once(f"stored-{quant}", write) / "model.moec"
