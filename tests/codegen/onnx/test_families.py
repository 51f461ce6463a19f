"""One file of each family gives eager's numbers at every batch and sequence length."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

import moec
from moec.closeness import TOLERANCES, distance
from tests.models.families import FAMILIES
from tests.models.test_families import BLOCKS

SIZES = ((1, 1), (2, 33), (3, 65))
TIER_1 = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "granitemoe", "phimoe",
]  # fmt: skip
OPERATOR = ("qwen2_moe", "deepseek_v3", "phimoe")  # softmax, corrected sigmoid, sparse mixer


def files(name: str, model: moec.CompiledModel, folder: Path) -> list[Path]:
    """A file for each ep, and for some families one with com.microsoft.MoE."""
    wanted = [("cpu", "auto"), ("portable", "auto")] + [("cpu", "op")] * (name in OPERATOR)
    made = []
    for ep, moe in wanted:
        path = folder / f"{ep}-{moe}.onnx"
        exported = model.export_onnx(path, ep, moe=moe)
        assert exported.errors["logits"] <= TOLERANCES["f32"]
        assert set(exported.parity.values()) == {1.0}
        assert len(exported.forms) == BLOCKS[name][0]
        made.append(path)
    return made


@pytest.mark.parametrize("name", TIER_1)
def test_equals_eager(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = moec.compile(family.build(), (), family.inputs(2, 7), build=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for path in files(name, model, tmp_path):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for batch, sequence in SIZES:
            ids = family.inputs(batch, sequence)["input_ids"]
            (logits,) = session.run(None, {"input_ids": ids.numpy()})
            (expected, *_) = model.captured.eager(ids)
            assert distance(torch.from_numpy(logits), expected) <= TOLERANCES["f32"]
