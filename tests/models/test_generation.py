"""Text from models with states besides their caches: convolutions, linear attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moec
from moec.runtime.package import carries
from tests.models.families import FAMILIES
from tests.models.other_families import OTHER_FAMILIES

TEXTS = [[5, 9, 12, 7, 33, 81, 4], [100, 3], [64], [8, 20, 31, 150, 9, 11, 77]]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["granitemoehybrid", "lfm2_moe", "qwen3_next"])
def test_the_tokens_of_hugging_face(name: str, order: int) -> None:
    """In float32, alone and in a batch of unequal lengths, where padding would be carried on.
    Either kind of layer is the last, which is cut to the tokens whose logits are asked for."""
    family = (FAMILIES | OTHER_FAMILIES)[name]
    kinds = family.fields["layer_types"][::order]
    model = replace(family, fields={**family.fields, "layer_types": kinds}).build()
    compiled = moec.compile(model, (), family.inputs(2, 7))
    assert compiled.package is not None
    assert carries(compiled.package.functions["decode"])
    assert "texts: " in compiled.report().checked_kernels
    greedy = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([text]), **greedy)[0].tolist() for text in TEXTS]
    alone = [compiled.generate([text], max_new_tokens=40, stop=())[0] for text in TEXTS]
    assert alone == expected
    assert compiled.generate(TEXTS, max_new_tokens=40, stop=()) == expected
