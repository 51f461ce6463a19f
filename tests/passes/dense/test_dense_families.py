"""The matches of the dense passes in each Hugging Face family, and unchanged results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from moec.ir.graph import Graph, Op
from moec.ir.interpret.evaluate import evaluate
from moec.ir.ops.dense.attention import Attention
from moec.passes.core.runner import Pass, PassResult, run
from moec.passes.dense.fold_mask import FoldMask
from moec.passes.dense.fuse_attention import FuseAttention
from moec.passes.dense.fuse_norm import FuseNorm
from moec.passes.dense.fuse_rotary import FuseRotary
from moec.passes.simplify.canonicalise import Canonicalise
from moec.passes.simplify.fold_constants import FoldConstants
from moec.passes.simplify.share_common import ShareCommon
from tests.models.captured import captured_program
from tests.models.families import SMALL
from tests.once import Once

BEFORE: list[Pass] = [Canonicalise(), FoldConstants(), ShareCommon()]
DENSE: list[Pass] = [FuseNorm(), FuseAttention(), FoldMask(), FuseRotary()]
AFTER: list[Pass] = [FoldConstants(), ShareCommon()]


@dataclass(frozen=True)
class Found:
    """How many of each; `masks` are the forms of the attentions, in order."""

    norms: int
    rotaries: int
    masks: tuple[str, ...] = ("causal",)


# Two norms a layer and a last one, two more where queries and keys (or, in DeepSeek, their
# compressed forms) have norms. Phimoe has layer norms. DeepSeek-V2 and gpt-oss have two layers.
# Switch has three attentions: one in the encoder and one of each kind in the decoder, whose
# masks read data.
FOUND = {
    "mixtral": Found(3, 2),
    "qwen2_moe": Found(3, 2),
    "qwen3_moe": Found(5, 2),
    "olmoe": Found(5, 2),
    "deepseek_v2": Found(9, 4, ("causal",) * 2),
    "deepseek_v3": Found(5, 2),
    "gpt_oss": Found(5, 4, ("causal window=8 sinks", "causal sinks")),
    "granitemoe": Found(3, 2),
    "phimoe": Found(0, 2),
    "switch_transformers": Found(7, 0, ("mask",) * 3),
    "jetmoe": Found(3, 2),
    "llama4": Found(5, 2, ("causal chunk=64",)),
}


Fused = Callable[[str], tuple[PassResult, ...]]


@pytest.fixture(scope="module")
def fused(once: Once) -> Fused:
    """The results of the passes by the family's name; the first is the program as captured."""

    @cache
    def results(name: str) -> tuple[PassResult, ...]:
        return tuple(run(captured_program(name, once), [*BEFORE, *DENSE, *AFTER]))

    return results


def form(a: Attention) -> str:
    parts: Mapping[str, object] = {"causal": a.causal, "mask": a.mask, "sinks": a.sinks}
    words = [word for word, held in parts.items() if held]
    limits = {"window": a.window, "chunk": a.chunk}
    words[1:1] = [f"{word}={limit}" for word, limit in limits.items() if limit is not None]
    return " ".join(words)


def found(graph: Graph) -> Found:
    count = Counter(op.name for op in graph.ops)
    attentions = [Attention.of(op) for op in graph.ops if op.name == "nn.attention"]
    return Found(count["nn.rms_norm"], count["nn.rotary"], tuple(map(form, attentions)))


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, fused: Fused) -> None:
    """All of them: no square root, no attention of another op, no complex number is left."""
    graph = fused(name)[-1].program.graph
    assert found(graph) == FOUND[name]
    left = {op.name.split(".")[1] for op in graph.ops}
    assert not left & {"rsqrt", "scaled_dot_product_attention", "view_as_complex", "polar"}
    grouped = [a for a in map(Attention.of, _attentions(graph)) if a.k.shape[1] != a.q.shape[1]]
    shares_keys = name not in ("deepseek_v2", "deepseek_v3", "switch_transformers", "jetmoe")
    assert len(grouped) == (len(FOUND[name].masks) if shares_keys else 0)


def _attentions(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.name == "nn.attention"]


@pytest.mark.parametrize("name", FOUND)
def test_declined(name: str, fused: Fused) -> None:
    """Nothing but Switch's masks, which are what the user passes."""
    reasons = [d.reason for step in fused(name) for d in step.declined]
    masks = ["attention_mask", "decoder_attention_mask", "attention_mask"]
    expected = [f"the mask depends on the values of {mask}, not only on sizes" for mask in masks]
    assert reasons == (expected if name == "switch_transformers" else [])


@pytest.mark.parametrize("name", FOUND)
def test_same_numbers(name: str, fused: Fused) -> None:
    """At sizes beyond the window (8), and for llama4 beyond the chunk (64)."""
    program = fused(name)[0].program
    after = fused(name)[-1].program
    family = SMALL[name]
    for batch, length in ((1, 1), (2, 19), (1, 70)):
        inputs = [v for v in family.inputs(batch, length).values() if isinstance(v, torch.Tensor)]
        want = evaluate(program.graph, inputs, program.weights)[0]
        actual = evaluate(after.graph, inputs, after.weights)[0]
        # float32: sums in another order, two layers deep.
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5)
