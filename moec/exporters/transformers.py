"""moec as a backend of transformers.exporters, registered when this module is imported.

    from moec.exporters.transformers import MoecConfig, MoecExporter

    exported = MoecExporter().export(model, inputs, MoecConfig(quant="int4:32"))
    exported(**inputs).logits
    exported.save_pretrained("exported")

`AutoHfExporter` and `AutoExportConfig` find it by its export_format, "moec". An export is the
result of `moec.compile`, verified against the model; a saved export is an artifact for `moec.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.exporters import ExportMetadata, HfExporter, ModelRunner, register_backend
from transformers.exporters.configs import ExportConfigMixin
from transformers.exporters.metadata import record_output_structure

from moec.api import compile as compile_model
from moec.errors import UsageError
from moec.model.load import LoadedModel, load


@dataclass
class MoecConfig(ExportConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """The arguments of `moec.compile` of the same names; batch and sequence vary."""

    export_format: str = "moec"
    target: str = "cpu"
    opt_level: int = 2
    passes: str = ""
    quant: str | None = None
    verify: bool | float = True
    quantizer: None = None  # transformers reads it from every config


class MoecExporter(HfExporter):  # type: ignore[misc]
    """`export` compiles a model of transformers; `sample_inputs` are arguments of its forward."""

    export_format = "moec"
    config_class = MoecConfig
    program_suffix = ".moec"
    requires_trust_remote_code = True  # an artifact holds machine code

    def export_program(
        self, model: Any, sample_inputs: Mapping[str, Any], config: MoecConfig
    ) -> tuple[Any, ExportMetadata]:
        """The compiled model. Raises what `moec.compile` does."""
        if config.quantizer is not None:
            raise UsageError("quantizer: moec quantises experts itself: give quant instead")
        compiled = compile_model(
            model,
            kwargs=sample_inputs,
            target=config.target,
            opt_level=config.opt_level,
            passes=config.passes,
            quant=config.quant,
            verify=config.verify,
        )
        return compiled, _metadata(model, sample_inputs)

    def export_for_generation(self, *args: Any, **options: Any) -> Any:
        """Raises UsageError: a single export generates text, without separate stages."""
        raise UsageError(
            "moec does not split a model into stages: call export(), then .program.generate"
        )

    @classmethod
    def save_program(cls, program: Any, path: str | Path) -> None:
        if isinstance(program, LoadedModel):
            raise UsageError(
                f"{program} was loaded from a file: copy that file instead of saving it"
            )
        program.save(path)

    @classmethod
    def load_program(cls, path: str | Path) -> Any:
        return load(path)


class MoecRunner(ModelRunner):  # type: ignore[misc]
    """Runs the compiled model, and returns the model's own output class."""

    def __init__(self, program: Any, metadata: ExportMetadata) -> None:
        super().__init__(metadata)
        self.program = program

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def from_program(cls, program: Any, metadata: ExportMetadata, device: Any = None) -> MoecRunner:
        """A runner on the CPU. Raises UsageError for any other device."""
        if device is not None and torch.device(device).type != "cpu":
            raise UsageError(f"device {device}: moec's code runs on a CPU")
        return cls(program, metadata)

    def __call__(
        self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = self.program(**kwargs)
        return self.unflatten(list(outputs.values()) if isinstance(outputs, dict) else [outputs])


def _metadata(model: Any, inputs: Mapping[str, Any]) -> ExportMetadata:
    """The metadata from which transformers rebuilds the model's output class."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    metadata = ExportMetadata(
        architecture=type(model).__name__,
        packages={"moec": _version("moec"), "transformers": _version("transformers")},
        export_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        export_device="cpu",
        kwargs={
            name: {"rank": value.dim(), "shape": list(value.shape)}
            for name, value in tensors.items()
        },
    )
    with torch.no_grad():
        cached = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
        record_output_structure(metadata, model(**{**cached, **inputs}))
    return metadata


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


register_backend(MoecExporter, MoecRunner)
