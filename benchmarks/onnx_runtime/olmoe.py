"""ONNX files of one full-width layer of OLMoE, for files.py: transformers' own export first.

    python -m benchmarks.onnx_runtime.olmoe FOLDER [--only hf cpu int8 int4:32 …]
    python -m benchmarks.onnx_runtime.files FOLDER/hf.onnx FOLDER/cpu.onnx \\
        FOLDER/int8.onnx --threads 2

The model has an embedding, attention, 64 experts of 2048x1024 with 8 per token, and a head of 1000
tokens, with random weights. The script needs about 6 GiB of memory and 5 GB of disk; transformers'
export needs the package onnxscript.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moec

VOCABULARY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=["hf", "cpu", "int8", "int4"])
    parser.add_argument("--check", action="store_true", help="run moec's files and compare")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = options.folder / f"{name.replace(':', '-')}.onnx"
        start = time.perf_counter()
        message = of_transformers(path) if name == "hf" else of_moec(path, name, options.check)
        print(f"{path}: {message}, {time.perf_counter() - start:.0f} s", flush=True)


def model() -> Any:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return OlmoeForCausalLM(config).requires_grad_(False).eval()


def inputs() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 7)), "use_cache": False}


def of_transformers(path: Path) -> str:
    import onnx_ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model(), inputs(), OnnxConfig(dynamic=True, ort_fusions="cpu"))
    onnx_ir.save(exported.program, path, external_data=f"{path.name}.data")
    return f"{len(list(exported.program.graph))} nodes"


def of_moec(path: Path, name: str, check: bool) -> str:
    quant = None if name == "cpu" else name
    compiled = moec.compile(model(), kwargs=inputs(), quant=quant, verify=False, build=False)
    exported = compiled.export_onnx(path, "cpu", verify=check)
    errors = "".join(
        f", error of {output} {error:.1e}" for output, error in exported.errors.items()
    )
    return (
        f"{exported.nodes} nodes, {exported.moe_nodes} of them for the MoE block, "
        f"{exported.bytes / 1e6:.0f} MB{errors}"
    )


if __name__ == "__main__":
    main()
