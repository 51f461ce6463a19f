"""Text through an ONNX file with its cache equals Hugging Face's, token by token, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from moec.export.kv_cache import CachedTexts
from moec.export.onnx import open_session, runner
from moec.passes.decode import with_past_inputs

PROMPTS = [[5, 9, 12, 7, 33, 81, 4], [100], [640, 3, 77], [8, 20, 31, 150, 9, 11, 77, 500, 2]]
TOKENS = 8


@pytest.fixture(scope="module")
def compiled(short_moe: Path) -> moec.CompiledModel:
    return moec.compile(short_moe, dtype="float32", build=False)


@pytest.mark.parametrize("ep", ["cpu", "portable"])
def test_the_tokens_of_hugging_face(
    compiled: moec.CompiledModel, short_moe: Path, ep: str, tmp_path: Path
) -> None:
    """Alone, and in a batch that is padded on the left."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(short_moe, dtype=torch.float32).eval()
    path = tmp_path / "model.onnx"
    compiled.export_onnx(path, ep)
    run = runner(open_session(path))
    program = with_past_inputs(compiled.pass_results[-1].program)
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    lengths = torch.tensor(list(map(len, PROMPTS)))
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    alone = [(torch.tensor([p]), torch.ones(1, len(p), dtype=torch.int64)) for p in PROMPTS]
    for ids, inputs in [*alone, (padded, mask)]:
        with torch.no_grad():
            expected = model.generate(
                ids,
                attention_mask=inputs,
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[:, ids.shape[1] :]
        texts = CachedTexts(program, run, len(ids))
        results = [texts.feed(ids, inputs)[:, -1:].argmax(-1)]
        while len(results) < TOKENS:
            results.append(texts.feed(results[-1])[:, -1:].argmax(-1))
        assert torch.equal(torch.cat(results, 1), expected)
