"""Form 1: the opaque op of a Hugging Face experts module.

    y = moec.experts(x[T, D], ids[T, k], weights[T, k], stacks…) <num_experts, body>

The op carries the body, so nothing has to be inferred. Ids of num_experts and more mean no expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

from moec.errors import NoMatch
from moec.ir.graph import Op, Ref
from moec.ir.text import parse
from moec.passes.proof.input_generators import Ids, Positive
from moec.passes.recognise.reading.block import Candidate, Proposal, keep_value
from moec.passes.recognise.region import Scope

NAME = "moec.experts.default"
FORM = "hf experts op"


def candidates(scope: Scope) -> Iterator[Candidate]:
    for op in scope.graph.ops:
        if op.name == NAME:
            yield Candidate(op, partial(propose, op))


def propose(op: Op) -> Iterator[Proposal]:
    refs = cast("tuple[Ref, ...]", op.attrs["params"])
    stacks = [op.inputs[ref.index] for ref in refs]
    x, ids, weights = op.inputs[:3]
    body = parse(cast(str, op.attrs["body"]))
    count = cast(int, op.attrs["num_experts"])
    if len(x.shape) != 2 or len(ids.shape) != 2:
        raise NoMatch(f"its input is {x.type} and its ids {ids.type}, expected [T, D] and [T, k]")
    yield Proposal(
        form=FORM,
        output=op.outputs[0],
        x=x,
        experts=keep_value(ids),
        weights=keep_value(weights),
        top_k=cast(int, ids.shape[1]),
        num_experts=count,
        stacks=tuple(map(keep_value, stacks)),
        body=body,
        cut=(x, ids, weights),
        feeds={ids: Ids(count, cast(int, ids.shape[1]), absent=True), weights: Positive()},
    )
