"""A mask that selects more or fewer positions than there are rows for them is refused by all that
runs a graph, as eager does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moec
from moec.errors import InputError
from moec.ir.interpret.evaluate import evaluate
from moec.runtime.sizes.counts import mismatch

IMAGE = 7


class Images(nn.Module):
    """Features of images take the place of their tokens, and of the tokens after them in `late`;
    others are added to both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)

    def forward(
        self, ids: torch.Tensor, features: torch.Tensor, late: torch.Tensor, deep: torch.Tensor
    ) -> torch.Tensor:
        mask = ids == IMAGE
        torch._check_tensor_all(mask.sum() * 4 == features.numel())
        hidden = self.embedding(ids).masked_scatter(mask[..., None], features)
        hidden = hidden.masked_scatter((ids == IMAGE + 1)[..., None], late)
        both = ids.clamp(IMAGE, IMAGE + 1) == ids
        hidden[both] = hidden[both] + deep
        return hidden


def _inputs(images: int, features: int, others: int, late: int, deep: int) -> list[torch.Tensor]:
    """Two texts with so many tokens of each kind, and so many rows for them."""
    ids = torch.randint(9, 20, (14,))
    ids[1 : 1 + images] = IMAGE
    ids[8 : 8 + others] = IMAGE + 1
    rows = (torch.randn(count, 4) for count in (features, late, deep))
    return [ids.reshape(2, 7), *rows]


AGREE = [(4, 4, 2, 2, 6), (1, 1, 2, 4, 3), (5, 5, 0, 1, 5)]
"""`late` may have rows that nothing takes, as in eager; the numbers of the others are equal."""
EMPTY = [(0, 0, 3, 3, 3), (0, 0, 0, 0, 0)]
"""Tables without rows: PyTorch and ONNX Runtime index none of them, compiled code does."""
DIFFER = {
    (4, 5, 2, 2, 6): "ids selects 4 positions .*, and features gives 5 rows .*: give as many of",
    (5, 4, 1, 1, 6): "ids selects 5 positions .*, and features gives 4 rows .*: give as many of",
    (2, 2, 3, 2, 5): "ids selects 3 positions .*, and late gives 2 rows .*: give at least a row",
    (2, 2, 1, 1, 4): "ids selects 3 positions .*, and deep gives 4 rows .*: give as many of",
}


@pytest.fixture(scope="module")
def compiled() -> moec.CompiledModel:
    torch.manual_seed(0)
    return moec.compile(Images().eval(), tuple(_inputs(4, 5, 2, 3, 7)), verify=False)


@pytest.mark.parametrize("numbers", AGREE + EMPTY, ids=str)
def test_numbers_that_agree_give_what_eager_gives(
    numbers: tuple[int, ...], compiled: moec.CompiledModel
) -> None:
    inputs = _inputs(*numbers)
    program = compiled.pass_results[-1].program
    theirs = compiled.captured.eager(*inputs)[0]
    # No number is computed, only moved and added once.
    torch.testing.assert_close(compiled(*inputs), theirs, rtol=0, atol=0)
    if numbers in AGREE:
        (meaning,) = evaluate(program.graph, inputs, program.weights)
        torch.testing.assert_close(meaning, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("numbers", DIFFER, ids=str)
def test_numbers_that_differ_are_refused(
    numbers: tuple[int, ...], compiled: moec.CompiledModel
) -> None:
    inputs = _inputs(*numbers)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        compiled.captured.eager(*inputs)
    with pytest.raises(InputError, match=f"rejects these inputs: {DIFFER[numbers]}"):
        compiled(*inputs)
    program = compiled.pass_results[-1].program
    with pytest.raises(InputError, match=f"^{DIFFER[numbers]}"):
        evaluate(program.graph, inputs, program.weights)


def test_a_file_of_onnx_refuses_them_with_an_index(
    tmp_path: Path, compiled: moec.CompiledModel
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    compiled.export_onnx(tmp_path / "model.onnx", verify=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # refusals are no errors of the test
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options)
    names = [port.name for port in session.get_inputs()]
    for numbers in AGREE:
        inputs = _inputs(*numbers)
        (actual,) = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        torch.testing.assert_close(torch.from_numpy(actual), compiled(*inputs), rtol=0, atol=0)
    for numbers in DIFFER:
        inputs = _inputs(*numbers)
        with pytest.raises(Exception, match="indices element out of data bounds"):
            session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


def test_the_sentence_agrees_with_the_number_of_inputs() -> None:
    assert mismatch(3, 3, True, "ids", "pixels") is None
    assert mismatch(2, 3, False, "ids", "pixels") is None
    sentence = mismatch(2, 3, True, "ids, mask", "")
    assert sentence is not None
    assert sentence.startswith("ids, mask select 2 positions")
    assert "and the model gives 3 rows" in sentence
