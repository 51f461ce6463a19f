"""Perplexity of examples/tiny_moe in few bits and in bfloat16, on held-out text.

    python -m benchmarks.approximation.perplexity [--formats int8,int4,int4:32] [--windows 64]

Each format is rounded to nearest; 4-bit formats are also fitted by GPTQ, on as many windows of
other files. All models run compiled, with rows in 8 bits if the format rounds them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoTokenizer

import moec
from benchmarks.approximation.allocations import MORE
from benchmarks.approximation.compress import FITTED_ON
from benchmarks.approximation.curves import CHECKPOINT, HELD_OUT, windows

LENGTH = 256


def ways(formats: list[str], text: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "bf16", {}
    for format in formats:
        yield format, {"quant": format}
        if format.startswith("int4"):
            yield f"{format}, calibrated", {"quant": format, "calib": text}


def perplexity(compiled: moec.CompiledModel, held_out: torch.Tensor) -> float:
    """The perplexity of each window's tokens [W, L] after its first."""
    total = 0.0
    for batch in held_out.split(8):
        logits = compiled(batch).float()
        total += float(
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            )
        )
    return math.exp(total / held_out[:, 1:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", default="int8,int4,int4:32")
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = windows(tokenizer, FITTED_ON, options.windows, LENGTH)
    held_out = windows(tokenizer, (*HELD_OUT, *MORE), options.windows, LENGTH)["input_ids"]
    before = 0.0
    for name, arguments in ways(options.formats.split(","), text):
        perplexities = perplexity(moec.compile(str(CHECKPOINT), **arguments), held_out)
        before = before or perplexities
        print(f"{name:20}{perplexities:9.3f}{perplexities / before - 1:+9.2%}", flush=True)


if __name__ == "__main__":
    main()
