"""Families with images, from pixels to logits: texts of any length, grids as constants."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.errors import CaptureError, InputError
from moec.ir.interpret.evaluate import evaluate
from moec.oracle.tolerance import distance
from tests.models.image_families import IMAGE, IMAGE_FAMILIES

TOLERANCE = 1e-5  # sums are reordered in float32, over a layer of vision and one of text
GRID = "image_grid_thw"


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_text_of_any_length_equals_eager(name: str) -> None:
    family = IMAGE_FAMILIES[name]
    model, example = family.build(), family.inputs(12)
    constants = [GRID] if GRID in example else []
    compiled = moec.compile(model, (), example, constants=constants, build=False)
    (block,) = compiled.blocks
    assert block.experts == 4
    program = compiled.pass_results[-1].program
    inputs = [value.name for value in program.graph.inputs]
    assert GRID not in inputs
    quiet = {} if name == "llama4" else {"use_cache": False}
    for sequence, start in ((12, 1), (7, 2), (30, 20)):
        case = family.inputs(sequence, start, seed=sequence)
        actual = evaluate(program.graph, [case[name] for name in inputs], program.weights)
        with torch.no_grad():
            theirs = model(**case, **quiet)
        theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.logits
        assert distance(actual[0], theirs) <= TOLERANCE
    for count in (3, 5):  # tokens of images in the second text
        case = family.inputs(12, 2)
        case["input_ids"][1] = 21
        case["input_ids"][1, 2 : 2 + count] = IMAGE
        with pytest.raises(ValueError, match=f"tokens: {4 + count}, features: 8"):
            model(**case, **quiet)
        words = rf"^input_ids selects {4 + count} positions .* pixel_values gives 8 rows for them"
        with pytest.raises(InputError, match=words):
            evaluate(program.graph, [case[name] for name in inputs], program.weights)


def test_a_grid_that_varies_is_refused_with_the_line_and_the_remedy() -> None:
    family = IMAGE_FAMILIES["qwen3_vl_moe"]
    with pytest.raises(CaptureError) as refusal:
        moec.compile(family.build(), (), family.inputs(12), build=False)
    lines = str(refusal.value).splitlines()
    assert "modeling_qwen3_vl_moe.py" in lines[1]
    assert "lengths.tolist()" in lines[1]
    assert "constants=INPUT (--constant INPUT)" in lines[2]


def test_the_code_of_a_model_with_images_is_verified() -> None:
    family = IMAGE_FAMILIES["minimax_m3_vl"]
    compiled = moec.compile(family.build(), (), family.inputs(12), constants=GRID, kv_cache=False)
    assert compiled.checked is not None
    assert "image_grid_thw is always [[1, 4, 4], [1, 4, 4]]" in compiled.report().notes
    case = family.inputs(9, 3)
    case.pop(GRID)
    with torch.no_grad():
        theirs = family.build()(**family.inputs(9, 3)).logits
    assert distance(compiled(**case).logits, theirs) <= TOLERANCE
