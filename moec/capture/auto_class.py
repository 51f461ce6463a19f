"""The class of transformers that loads a checkpoint: a language model, or a model with images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.errors import CaptureError

_IMAGES = "pixel_values"
_REMEDY = (
    "write a function that returns the model and its inputs, a text and images as the processor "
    "gives them, and compile FILE.py:FUNCTION, with --constant image_grid_thw where the inputs "
    "have one"
)


@dataclass(frozen=True)
class AutoClass:
    """One of the Auto classes of transformers, and a note about what it leaves out."""

    auto: Any
    notes: tuple[str, ...] = ()


def auto_class(folder: Path, config: Mapping[str, Any], inputs: Collection[str]) -> AutoClass:
    """The class that loads a checkpoint whose example has `inputs`.

    A checkpoint with images is loaded as a whole if the example has images, else as the language
    model in it. Raises CaptureError if transformers has no language model of this type.
    """
    import transformers
    from transformers.models.auto import modeling_auto as names

    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        return AutoClass(transformers.AutoModelForSeq2SeqLM)
    images = kind in names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if images and _IMAGES in inputs:
        return AutoClass(transformers.AutoModelForImageTextToText)
    architecture = next(iter(config.get("architectures") or ()), f"a model of type {kind}")
    if kind not in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if images:
            raise CaptureError(
                f"{folder} holds {architecture}, a model with images, and a folder gives no "
                f"images: {_REMEDY}"
            )
        raise CaptureError(
            f"{folder} holds {architecture}, which is no language model of transformers: load "
            "the model yourself and give it to moec.compile, or write file.py:factory"
        )
    if not images or "vision_config" not in config:
        return AutoClass(transformers.AutoModelForCausalLM)
    note = f"only the language model of {architecture} is compiled; for images, {_REMEDY}"
    return AutoClass(transformers.AutoModelForCausalLM, (note,))
