"""A folder to write in another form: its weights, and how transformers names and stacks them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.capture import Captured
from moec.capture.auto_class import auto_class
from moec.capture.hub import hub_off, own_config
from moec.files.checkpoint import CONFIG
from moec.files.regular_file import read_regular
from moec.passes.core.runner import PassResult
from moec.report.data import QuantisedLine
from moec.sources.checkpoint.conversion import Conversion, conversion_of
from moec.sources.checkpoint.load import check_config, check_experts, empty_model
from moec.sources.checkpoint.table import format_of, quantization_of
from moec.sources.checkpoint.tensors import map_folder
from moec.sources.checkpoint.weight import CheckpointWeight


@dataclass(frozen=True)
class SourceCheckpoint:
    """The weights of a folder, and the conversion of a model without values that determines what
    they are; `fields` are those of config.json, `config` is the model's."""

    fields: Mapping[str, Any]
    weights: Mapping[str, CheckpointWeight]
    conversion: Conversion

    @property
    def config(self) -> Any:
        return self.conversion.model.config


def open_checkpoint(folder: Path) -> SourceCheckpoint:
    """Maps the folder's files. Raises CaptureError where they are of no model, or lack experts."""
    fields = json.loads(read_regular(folder / CONFIG))
    check_config(folder / CONFIG, fields)
    tensors = map_folder(folder)
    weights = format_of(fields, tuple(tensors)).read(quantization_of(fields) or {}, tensors)
    check_experts(weights)
    with hub_off():
        empty = empty_model(auto_class(folder, fields, ()).auto, own_config(folder))
    return SourceCheckpoint(fields, weights, conversion_of(empty))


@dataclass(frozen=True)
class Transformed:
    """A model after its passes: the last of `pass_results` has the graph to export. `quantised` has
    a line for each module whose weights became codes; `name` is for messages."""

    name: str
    captured: Captured
    pass_results: tuple[PassResult, ...]
    quantised: tuple[QuantisedLine, ...]
