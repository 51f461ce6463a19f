"""Past keys and values as inputs: chunks and padding give the results of the whole text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import print_graph
from moec.passes.decode import with_past_inputs
from tests.passes.decode.test_incremental import ATTENTION, HEAD, TAIL, carrying, folded, program

LIMITED = {
    "causal": ATTENTION,
    "window": ATTENTION.replace("causal=true", "causal=true, window=3"),
    "chunk": ATTENTION.replace("causal=true", "causal=true, chunk=3"),
}
FAR = 1e-5  # of the greatest logit: sums over 8 features and 30 keys in another order


def limited(kind: str) -> Program:
    return program(HEAD + LIMITED[kind] + TAIL)


def logits(step: Program, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of all slots [B, slots, V], for pieces of ids [B, S] and masks [B, S]."""
    batch = len(pieces[0][0])
    past = [torch.zeros(batch, 2, 0, 4) for _ in step.graph.inputs[2:]]
    masks: list[Tensor] = []
    matches = []
    for ids, mask in pieces:
        masks.append(mask)
        result, *past = evaluate(step.graph, [ids, torch.cat(masks, 1), *past], step.weights)
        matches.append(result)
    return torch.cat(matches, 1)


def test_the_graph(golden: Callable[[str], None]) -> None:
    golden(print_graph(with_past_inputs(limited("window")).graph))


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(LIMITED)),
    texts=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3),
    stops=st.sets(st.integers(1, 8)),
    seed=st.integers(0, 99),
    fold=st.booleans(),
)
def test_padding_anywhere(
    kind: str, texts: list[list[bool]], stops: set[int], seed: int, fold: bool
) -> None:
    """Where a slot holds a token, its logits are those of its text without the padding; nowhere
    is a NaN. The padding is any token at all."""
    full = folded(limited(kind)) if fold else limited(kind)
    step = with_past_inputs(full)
    mask = torch.tensor(texts, dtype=torch.int64)
    ids = torch.randint(9, mask.shape, generator=torch.Generator().manual_seed(seed))
    ends = [*sorted(stops), 9]
    pieces = [(ids[:, a:b], mask[:, a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    actual = logits(step, pieces)
    assert actual.isfinite().all()
    for text, row, entry in zip(ids, actual, mask.bool(), strict=True):
        if entry.any():
            (expected,) = evaluate(full.graph, [text[entry][None]], full.weights)
            assert (row[entry] - expected[0]).abs().max() <= FAR * expected.abs().max()


def test_equal_limits_are_written_once() -> None:
    second = ATTENTION.replace("y1:", "y0:")
    graph = with_past_inputs(
        program(HEAD + second + ATTENTION.replace("(q, q, q)", "(y0, q, q)") + TAIL)
    ).graph
    attentions = [op for op in graph.ops if op.name == "nn.attention"]
    assert len({op.inputs[3] for op in attentions}) == 1
    assert [value.name for value in graph.inputs[2:]] == [
        f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")
    ]
    assert [value.name for value in graph.outputs[1:]] == [
        f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")
    ]


def test_other_states_are_refused() -> None:
    full = carrying()
    with pytest.raises(NoMatch) as refused:
        with_past_inputs(full)
    assert str(refused.value) == (
        "the convolution at model.conv carries a state from token to token, which padding would "
        "change"
    )


def test_what_pieces_cannot_be_is_refused() -> None:
    with pytest.raises(NoMatch, match=r"the attention at model\.attention is not causal"):
        with_past_inputs(program(HEAD + ATTENTION.replace("=true", "=false") + TAIL))
