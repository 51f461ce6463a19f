"""Prepared Hugging Face models: eager's logits, no op left to PyTorch, one compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.dynamo import FallbackWarning
from moec.errors import UsageError
from tests.models.families import FAMILIES

TIER_1 = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "phimoe",
)


def compiled(model: Any) -> Any:
    return torch.compile(
        model, backend="moec", dynamic=True, options={"rest": "eager", "strict": True}
    )


@pytest.mark.parametrize("name", TIER_1)
def test_logits(name: str) -> None:
    family = FAMILIES[name].one_layer()
    eager = family.build()
    run = compiled(moec.prepare(family.build()))
    sizes = [(2, 7), (2, 9), (3, 5), (2, 2), (4, 16), (5, 3), (2, 31), (3, 11), (6, 4), (2, 12)]
    with torch.no_grad():
        for batch, length in sizes:
            inputs = family.inputs(batch, length, seed=length)
            # float32 through a few layers whose sums are in another order
            torch.testing.assert_close(
                run(**inputs).logits, eager(**inputs).logits, rtol=1e-4, atol=1e-5
            )
    stats = moec.stats()
    assert (stats.compilations, stats.blocks, stats.fallbacks) == (1, 1, ())


@pytest.mark.parametrize("name", ["deepseek_v3", "phimoe"])
def test_one_text(name: str) -> None:
    """Dynamo fixes sizes of one, so that the blocks are recognised in other graphs."""
    family = FAMILIES[name].one_layer()
    eager = family.build()
    run = compiled(moec.prepare(family.build()))
    with torch.no_grad():
        for batch, length in ((1, 5), (1, 1), (1, 9)):
            inputs = family.inputs(batch, length, seed=length)
            torch.testing.assert_close(
                run(**inputs).logits, eager(**inputs).logits, rtol=1e-4, atol=1e-5
            )
    stats = moec.stats()
    assert (stats.compilations, stats.blocks, stats.fallbacks) == (2, 2, ())


def test_logits_where_inductor_takes_the_rest() -> None:
    family = FAMILIES["qwen3_moe"].one_layer()
    eager = family.build()
    run = torch.compile(
        moec.prepare(family.build()), backend="moec", dynamic=True, options={"strict": True}
    )
    with torch.no_grad():
        for batch, length in ((2, 7), (3, 5)):
            inputs = family.inputs(batch, length, seed=length)
            torch.testing.assert_close(
                run(**inputs).logits, eager(**inputs).logits, rtol=1e-4, atol=1e-5
            )
    assert (moec.stats().compilations, moec.stats().blocks) == (1, 1)


def test_generation(short_moe: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = torch.tensor([[5, 9, 2, 11, 7]])
    texts = []
    for prepared in (False, True):
        model = AutoModelForCausalLM.from_pretrained(short_moe, dtype=torch.float32).eval()
        if prepared:
            model.forward = compiled(moec.prepare(model).forward)
        texts.append(model.generate(prompt, max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)
    assert moec.stats().blocks > 0
    assert moec.stats().fallbacks == ()


def test_an_unprepared_model_says_what_to_do() -> None:
    family = FAMILIES["mixtral"].one_layer()
    model = family.build()
    model.set_experts_implementation("eager")
    run = torch.compile(model, backend="moec", options={"rest": "eager"})
    inputs = family.inputs(2, 7)
    with torch.no_grad(), pytest.warns(FallbackWarning) as record:
        run(**inputs)
    messages = [str(warning.message) for warning in record if warning.category is FallbackWarning]
    assert len(messages) == 2  # the router's graph, and the loop behind it
    assert all("moec.prepare(model)" in words for words in messages)


def test_preparing() -> None:
    model = nn.Linear(4, 4)
    assert moec.prepare(model) is model
    with pytest.raises(UsageError, match="a str is not a torch module"):
        moec.prepare("mixtral")  # type: ignore[type-var]


def test_a_prepared_model_runs_and_compiles_as_before() -> None:
    family = FAMILIES["qwen2_moe"]
    model, eager = moec.prepare(moec.prepare(family.build())), family.build()
    inputs = family.inputs(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs).logits, eager(**inputs).logits, rtol=1e-4, atol=1e-5
        )
    assert len(moec.compile(model, kwargs=inputs, verify=False, build=False).blocks) == 2
    with torch.no_grad():  # capturing has left it prepared
        model(**inputs)
