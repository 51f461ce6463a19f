"""A layer as ONNX files in ONNX Runtime, in both forms that a block of experts has there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from torch import Tensor

from moec.model.compiled import CompiledModel

FORMS = {"MoE op": "op", "ONNX rows": "rows"}


def onnx_ways(compiled: CompiledModel, threads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, the compiled float32 layer x[1, T, D] -> [1, T, D] in two forms: one
    com.microsoft.MoE, and sorted rows with one product per expert and projection, the form of
    transformers' own export. Each file is compared with eager when it is written, and deleted once
    its session exists. Threads do not spin between calls, because spinning would slow down the next
    contender."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def way(form: str) -> Callable[[Tensor], Tensor]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            compiled.export_onnx(path, "cpu", moe=form)
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        (inputs,) = session.get_inputs()
        return lambda x: torch.from_numpy(session.run(None, {inputs.name: x.numpy()})[0])

    return {name: way(form) for name, form in FORMS.items()}
