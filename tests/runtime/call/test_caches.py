"""A language model that keeps its keys between calls generates eager's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moec
from moec.errors import InputError
from moec.runtime.artifact import artifact
from moec.runtime.call.executor import load
from moec.runtime.text.causal_lm import causal_lm
from moec.runtime.text.generate import generate, slow
from moec.runtime.text.request import Request

LONGEST, WIDTH, VOCABULARY = 12, 8, 11


class Remembers(nn.Module):
    """One head of attention over the cache `keys` [1, 1, LONGEST, WIDTH]."""

    keys: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("keys", torch.zeros(1, 1, LONGEST, WIDTH))

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        self.keys.index_copy_(2, cache_position, x[:, None])
        visible = torch.arange(LONGEST)[None, :] <= cache_position[:, None]
        scores = (x @ self.keys[0, 0].T).masked_fill(~visible, float("-inf"))
        return self.out(scores.softmax(-1) @ self.keys[0, 0] + x)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Remembers]:
    torch.manual_seed(3)
    model = Remembers().eval()
    length = torch.export.Dim("S", min=1, max=LONGEST)
    compiled = moec.compile(
        model,
        (torch.tensor([[1, 2, 3]]), torch.arange(3)),
        dynamic_shapes=({1: length}, {0: length}),
    )
    path = tmp_path_factory.mktemp("cached") / "cached.moec"
    compiled.save(path)
    model.keys.zero_()
    return path, model


def test_generates_as_eager_does(saved: tuple[Path, Remembers]) -> None:
    path, model = saved
    prompt = [4, 1, 9]
    text, done = list(prompt), 0
    with torch.no_grad():
        while len(text) <= LONGEST:
            logits = model(torch.tensor([text[done:]]), torch.arange(done, len(text)))
            done = len(text)
            text.append(int(logits[0, -1].argmax()))
    executor = load(path)
    for _ in range(2):  # each generation starts from an empty cache
        results = [token for (token,) in generate(executor, [prompt], Request(99))]
        assert results == text[len(prompt) :]
    assert len(set(text)) > 3  # it does not just repeat itself
    assert causal_lm(executor.package.main).longest == LONGEST
    assert slow(executor) == ""
    with pytest.raises(InputError, match="2 prompts, and the model's own cache is for one"):
        list(generate(executor, [prompt, prompt], Request(9)))


def test_the_stored_sample_starts_from_the_first_state(saved: tuple[Path, Remembers]) -> None:
    sample = artifact.read(saved[0]).samples[0]
    executor = load(saved[0])
    for _ in range(2):
        executor.reset()
        result = executor(sample.inputs)
        for name, expected in sample.outputs.items():
            assert (result[name] == expected).all()
