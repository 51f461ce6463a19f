"""What may be raced: names, and what each needs."""

from __future__ import annotations

TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
"""Ways of transformers to run experts."""
BASELINES = (*TRANSFORMERS, "inductor")
PACKAGES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "llama.cpp": "llama-cpp-python",
}
"""Baselines that run a file (of_files.py), and the package of each."""
