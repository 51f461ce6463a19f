"""Which class of transformers loads a checkpoint, and what is said about images."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from moec.capture.auto_class import auto_class
from moec.errors import CaptureError

FOLDER = Path("folder")


def _config(kind: str, architecture: str, **fields: object) -> dict[str, object]:
    return {"model_type": kind, "architectures": [architecture], **fields}


def test_a_language_model_and_one_with_an_encoder() -> None:
    loader = auto_class(FOLDER, _config("mixtral", "MixtralForCausalLM"), ())
    assert (loader.auto, loader.notes) == (transformers.AutoModelForCausalLM, ())
    config = _config("nllb-moe", "NllbMoeForConditionalGeneration", is_encoder_decoder=True)
    assert auto_class(FOLDER, config, ()).auto is transformers.AutoModelForSeq2SeqLM


def test_a_model_with_images_needs_images() -> None:
    config = _config("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", vision_config={})
    loader = auto_class(FOLDER, config, ("input_ids", "pixel_values"))
    assert loader.auto is transformers.AutoModelForImageTextToText
    with pytest.raises(CaptureError) as refusal:
        auto_class(FOLDER, config, ("input_ids",))
    assert str(refusal.value).startswith(
        "folder holds Qwen3VLMoeForConditionalGeneration, a model with images, and a folder gives "
        "no images: write a function that returns the model and its inputs"
    )
    assert "compile FILE.py:FUNCTION, with --constant image_grid_thw" in str(refusal.value)


def test_the_language_model_in_a_model_with_images_is_said_to_be_compiled_alone() -> None:
    config = _config("llama4", "Llama4ForConditionalGeneration", vision_config={})
    loader = auto_class(FOLDER, config, ())
    assert loader.auto is transformers.AutoModelForCausalLM
    (note,) = loader.notes
    assert note.startswith("only the language model of Llama4ForConditionalGeneration is compiled")


def test_another_kind_of_model() -> None:
    with pytest.raises(CaptureError, match="folder holds ViTModel, which is no language model of"):
        auto_class(FOLDER, _config("vit", "ViTModel"), ())
