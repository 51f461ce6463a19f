"""What is damaged: two small models, the files of their inputs, and graphs of many forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from moec.runtime import artifact
from tests.commands import models
from tests.runtime import toy

_GOLDEN = Path(__file__).parents[1] / "golden/passes"
_TEXTS = (
    "lower/test_moe_passes/test_text[fold-addend]",
    "approximate/test_insert_zero_experts/test_fused_text",
    "recognise/test_recognise/test_forms[capacity-slot]",
    "decode/test_incremental/test_the_step",
    "decode/test_incremental/test_what_is_carried",
    "decode/test_kv_inputs/test_the_graph",
    "approximate/test_refactor_dense/test_text",
    "parallel/test_plan_parallelism/test_text[slices]",
)


def graphs() -> tuple[str, ...]:
    """Texts of graphs that are right, and may be in an artifact."""
    return tuple((_GOLDEN / f"{name}.txt").read_text() for name in _TEXTS)


def write_seeds(folder: Path) -> None:
    """`toy.moec` with weights, a state and a sample; `speaker.moec`, which continues text; and the
    inputs of the first as x.npz, y.npz, x.npy and x.safetensors."""
    package = toy.package()
    texts = {"main": graphs()[0]}
    extra = {"report": models.report().to_dict()}
    artifact.write(
        package, folder / "toy.moec", graphs=texts, samples=[toy.sample(package)],
        tolerance=1e-4, extra=extra,
    )  # fmt: skip
    artifact.write(
        toy.language_model(), folder / "speaker.moec", graphs=texts, extra=extra,
        files=toy.tokenizer_files(),
    )  # fmt: skip
    inputs = toy.inputs()
    np.savez(folder / "x.npz", **inputs)
    np.savez_compressed(folder / "y.npz", **inputs)
    np.save(folder / "x.npy", inputs["x"])
    (folder / "x.safetensors").write_bytes(save(inputs))
