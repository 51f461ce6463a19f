"""SmolLM2-135M-Instruct as a Mixtral, its experts those of upcycle.py; see beside_llama.py.

$ python -m benchmarks.models.mixtral FOLDER      # FOLDER: a checkpoint, bf16, with a tokenizer
$ moec export FOLDER -o mixtral.gguf
$ llama-quantize mixtral.gguf mixtral-Q4_K_M.gguf Q4_K_M
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.models import smollm2
from benchmarks.models.upcycle import EXPERTS, K, upcycle

SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


def mixtral(model: Any) -> MixtralForCausalLM:
    """The Mixtral in bf16 of a Llama whose MLPs are all upcycled."""
    shared = {name: getattr(model.config, name) for name in SHARED}
    config = MixtralConfig(**shared, num_local_experts=EXPERTS, num_experts_per_tok=K)
    state = {name: v for name, v in model.state_dict().items() if ".mlp." not in name}
    for number, layer in enumerate(model.model.layers):
        stem, experts = f"model.layers.{number}.mlp.", layer.mlp.experts
        state[stem + "gate.weight"] = layer.mlp.router.weight
        both = [torch.cat((e.gate.weight, e.up.weight)) for e in experts]
        state[stem + "experts.gate_up_proj"] = torch.stack(both)
        state[stem + "experts.down_proj"] = torch.stack([e.down.weight for e in experts])
    result = MixtralForCausalLM(config)
    result.load_state_dict(state)
    return result.to(torch.bfloat16)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = smollm2.load()
    errors = upcycle(model, tokenizer, range(len(model.model.layers)), steps=10, bias=False)
    mixtral(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    click.echo(f"wrote {folder}; errors of layers {min(errors):.2f} to {max(errors):.2f}")


if __name__ == "__main__":
    main()
