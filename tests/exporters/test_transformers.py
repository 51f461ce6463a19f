"""moec through transformers' interface for exporters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.exporters import AutoExportConfig, AutoHfExporter, ExportedModel

from moec.errors import UsageError
from moec.exporters.transformers import MoecConfig, MoecExporter, MoecRunner
from tests.models.families import FAMILIES

FAMILY = FAMILIES["olmoe"]


def test_an_export_is_the_model_and_survives_saving(tmp_path: Path) -> None:
    model = FAMILY.build()
    ids = FAMILY.inputs(2, 7)["input_ids"]
    config = AutoExportConfig.from_dict({"export_format": "moec", "opt_level": 1})
    exported = AutoHfExporter.from_config(config).export(model, {"input_ids": ids}, config)
    assert isinstance(config, MoecConfig)
    other = FAMILY.inputs(1, 9, seed=3)["input_ids"]
    with torch.no_grad():
        expected = model(other, use_cache=False)
    onnx_file = exported(input_ids=other)
    assert type(onnx_file) is type(expected)
    torch.testing.assert_close(onnx_file.logits, expected.logits, rtol=1e-4, atol=1e-4)

    exported.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code"):
        ExportedModel.from_pretrained(tmp_path / "saved")
    loaded = ExportedModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(loaded(input_ids=other).logits, onnx_file.logits)
    with pytest.raises(
        UsageError, match="was loaded from a file: copy that file instead of saving it"
    ):
        loaded.save_pretrained(tmp_path / "again")


def test_what_it_does_not_do_is_said() -> None:
    with pytest.raises(UsageError, match="moec does not split a model into stages: call export"):
        MoecExporter().export_for_generation(None, {}, MoecConfig())
    config = MoecConfig()
    config.quantizer = object()  # type: ignore[assignment]
    with pytest.raises(UsageError, match="quantizer: moec quantises experts itself"):
        MoecExporter().export(None, {}, config)
    with pytest.raises(UsageError, match="device cuda: moec's code runs on a CPU"):
        MoecRunner.from_program(None, None, "cuda")
