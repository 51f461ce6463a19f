"""A model with the shape of Granite-3.0-1B-A400M and random weights, for moec bench and its
baselines.

    $ python -m benchmarks.models.granite FOLDER          # FOLDER/model: a checkpoint, bf16
    $ python -m benchmarks.models.granite FOLDER --gguf   # and model-bf16.gguf, model-q8_0.gguf

The GGUF files are granitemoe models of llama.cpp, written with the package gguf. Servers need a
tokenizer: `--tokenizer FILE.gguf`, such as that of benchmarks/models/smollm2.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from moec.files.gguf import read_header
from moec.sources.checkpoint.gguf.tokenizer import tokenizer_files

SHAPE: dict[str, Any] = {
    "vocab_size": 49155,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
UNUSED = 5  # the kind of a token in GGUF
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}


def model() -> GraniteMoeForCausalLM:
    torch.manual_seed(0)
    config = GraniteMoeConfig(**SHAPE, dtype=torch.bfloat16)
    return GraniteMoeForCausalLM(config).to(torch.bfloat16)


def add_tokenizer(writer: Any, source: Path | None, size: int) -> None:
    """The tokenizer of a GGUF file, with as many unused tokens as the vocabulary has more."""
    if source is None:
        writer.add_tokenizer_model("no_vocab")
        return
    fields = read_header(source).fields
    more = size - len(fields["tokenizer.ggml.tokens"])
    added = {"tokens": [f"<unused_{i}>" for i in range(more)], "token_type": [UNUSED] * more}
    scalars = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for name, value in fields.items():
        if name.startswith("tokenizer.ggml."):
            value = value + added.get(name[15:], []) if isinstance(value, list) else value
            scalars.get(type(value), writer.add_array)(name, value)


def write_gguf(
    model: GraniteMoeForCausalLM, path: Path, kind: str, tokenizer: Path | None = None
) -> None:
    """`kind`, BF16 or Q8_0, is the type of all matrices; vectors and routers are float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "granitemoe")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    expected = gguf.GGMLQuantizationType[kind]

    def add(name: str, tensor: torch.Tensor, wide: bool = False) -> None:
        array = tensor.detach().float().numpy()
        if wide or array.ndim == 1:
            writer.add_tensor(name, array)
            return
        writer.add_tensor(name, gguf.quants.quantize(array, expected), raw_dtype=expected)

    weights = dict(model.named_parameters())
    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    for i, layer in enumerate(model.model.layers):
        for name, source in LAYER.items():
            add(f"blk.{i}.{name}.weight", weights[f"model.layers.{i}.{source}.weight"])
        moe = layer.block_sparse_moe
        gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
        gate, up = gate_up.chunk(2, dim=1)
        add(f"blk.{i}.ffn_gate_inp.weight", moe.router.weight, wide=True)
        add(f"blk.{i}.ffn_gate_exps.weight", gate)
        add(f"blk.{i}.ffn_up_exps.weight", up)
        add(f"blk.{i}.ffn_down_exps.weight", down)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--gguf", "with_gguf", is_flag=True, help="Also for llama.cpp.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A GGUF file that has it.")
def main(folder: Path, with_gguf: bool, tokenizer: Path | None) -> None:
    module = model()
    module.save_pretrained(folder / "model")
    for name, content in (
        tokenizer_files(read_header(tokenizer).fields).items() if tokenizer else ()
    ):
        (folder / "model" / name).write_bytes(content)
    click.echo(f"wrote {folder / 'model'}: {sum(p.numel() for p in module.parameters()):,} weights")
    for kind in ("BF16", "Q8_0") if with_gguf else ():
        path = folder / f"model-{kind.lower()}.gguf"
        write_gguf(module, path, kind, tokenizer)
        click.echo(f"wrote {path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
