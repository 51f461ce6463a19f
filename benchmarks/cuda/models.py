"""Whole models: tokens of small ones against transformers, and times of models of real size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.cuda.layers import TOLERANCE, milliseconds
from benchmarks.cuda.shapes import LayerShape
from benchmarks.records import Cell

PROMPT, NEW = 8, 32  # tokens
LONG = 512
"""Tokens of the prompt of a model of real size."""
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "granite-1b-a400m": (
        "GraniteMoe",
        {
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "vocab_size": 49155,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe-1b-7b": (
        "Olmoe",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "vocab_size": 50304,
        },
    ),
}
"""Classes of transformers, and sizes in the config.json of
ibm-granite/granite-3.0-1b-a400m-base and allenai/OLMoE-1B-7B-0924."""


def build(name: str, **sizes: object) -> Any:
    """A model of MODELS with random weights in bf16; `sizes` replace those of its config."""
    import torch
    import transformers

    family, config = MODELS[name]
    config_class = getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = getattr(transformers, f"{family}ForCausalLM")(config_class(**(config | sizes)))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval()


def compiled(model: Any, target: str) -> Any:
    import torch

    import moec

    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    return moec.compile(model, kwargs={"input_ids": ids}, target=target, verify=False)


def whole(
    model: Any, run: Any, device: str, prompt: int = LONG, new: int = NEW
) -> Iterator[dict[str, Cell]]:
    """Milliseconds of a prompt, beside eager and Inductor, and of a token, beside transformers'
    generate. Raises SystemExit if half of the logits' rows differ by more than TOLERANCE: in 16
    bits, nearly equal scores may choose other experts."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (1, prompt))
    model = model.to(device)
    inductor = torch.compile(model, dynamic=False)
    ways: dict[str, Callable[[Any], Any]] = {
        "moec": run,
        "eager": lambda x: model(x, use_cache=False).logits,
        "inductor": lambda x: inductor(x, use_cache=False).logits,
    }
    here = ids.to(device)
    with torch.no_grad():
        result, expected = (ways[name](here) for name in ("moec", "eager"))
        result = getattr(result, "logits", result)
        errors = (result.float() - expected.float()).abs().amax(-1) / expected.float().abs().max()
        share = float((errors > TOLERANCE).float().mean())
        if share > 0.5:
            raise SystemExit(f"the kernels are wrong: {share:.1%} of the logits' rows differ")
        row: dict[str, Cell] = {"case": f"prompt of {prompt}", "differing": round(share, 3)}
        yield row | milliseconds(ways, here, device)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts: dict[str, Callable[[Any], Any]] = {
        "moec": lambda x: run.generate(x.cpu().numpy(), max_new_tokens=new, stop=()),
        "eager": lambda x: model.generate(x, **options),
    }
    times = milliseconds(texts, here[:, :PROMPT], device)
    yield {
        "case": "token",
        **{name: round(float(each or 0) / new, 3) for name, each in times.items()},
    }


def text(layer: LayerShape, device: str, target: str, new: int = NEW) -> str:
    """One line: milliseconds per token. Raises SystemExit if tokens differ from transformers'."""
    import numpy as np
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    import moec

    heads = max(1, layer.width // 128)
    config = OlmoeConfig(
        hidden_size=layer.width,
        intermediate_size=layer.hidden,
        num_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=1024,
    )
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).requires_grad_(False).eval()
    ids = torch.randint(0, 1024, (1, PROMPT))
    run = moec.compile(model, kwargs={"input_ids": ids}, target=target, verify=False)
    model = model.to(device)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ways: dict[str, Callable[[], Any]] = {
        "moec": lambda: run.generate(ids.numpy(), max_new_tokens=new, stop=()),
        "transformers": lambda: model.generate(ids.to(device), **options).cpu().numpy(),
    }
    tokens, milliseconds = {}, {}
    for name, way in ways.items():
        tokens[name] = way()
        start = time.perf_counter()
        way()
        milliseconds[name] = (time.perf_counter() - start) * 1e3 / new
    if not np.array_equal(*tokens.values()):
        raise SystemExit("the kernels are wrong: the tokens differ from those of transformers")
    return ", ".join(f"{name} {each:.2f} ms a token" for name, each in milliseconds.items())
