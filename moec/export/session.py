"""Runs an ONNX file in ONNX Runtime on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch

from moec.errors import VerificationError

if TYPE_CHECKING:
    from onnx import ModelProto

Results = Mapping[str, torch.Tensor]


def open_session(path: Path, model: ModelProto | None = None) -> Any:
    """A session on the CPU for the file, or for `model`, whose weights are next to the file.

    Raises VerificationError where ONNX Runtime rejects it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    source: Any = str(path)
    if model is not None:
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(path.parent))
        source = model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise VerificationError(f"ONNX Runtime rejects the file: {_one_line(error)}") from error


def runner(session: Any) -> Callable[[Mapping[str, Any]], Results]:
    """A function that takes inputs by name, ignoring those that the file does not have.

    Raises VerificationError where ONNX Runtime fails.
    """
    inputs = {port.name for port in session.get_inputs()}
    outputs = [port.name for port in session.get_outputs()]

    def run(values: Mapping[str, Any]) -> Results:
        feeds = {k: np.ascontiguousarray(_array(v)) for k, v in values.items() if k in inputs}
        try:
            results = session.run(None, feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {feed.shape}" for name, feed in feeds.items())
            raise VerificationError(f"the file fails for {shapes}: {_one_line(error)}") from error
        return {
            name: torch.from_numpy(np.asarray(r)) for name, r in zip(outputs, results, strict=True)
        }

    return run


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _array(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value
