"""Routers in which an input of the model names an expert that each token must have.

    w, i = topk(softmax(logits), 2)
    missing = (i != languages).all(-1)
    i = cat(i[:, :1], where(missing, languages, i[:, 1:]))     w, i = moe.route(logits) <k=2>
    w = softmax(logits).gather(i)                          ->  w, i = moe.force(w, i, logits,
                                                                                 languages)

ApolloMoE trains this way (arXiv 2410.10626): if the expert of a token's language is not among its
choices, it replaces the last one. As for other routers (`router`), hypotheses are tested on random
logits; the ops of the model only suggest them.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.dtypes import INDEX_DTYPES
from moec.ir.graph import Value
from moec.ir.sizes.dims import product
from moec.ops.routing.routing import Routing
from moec.passes.recognise.region import RegionEmitter, Scope


def forced_ids(scope: Scope, results: Sequence[Value], logits: Value) -> Value | None:
    """The only integer input, one id per token, that the choices read besides the logits; None if
    there is none."""
    ops = scope.upstream(results, [logits])
    others = [v for v in scope.leaves(ops, [logits]) if v not in scope.params]
    tokens = product(logits.shape[:-1])
    if len(others) == 1 and others[0].dtype in INDEX_DTYPES:
        return others[0] if product(others[0].shape) == tokens else None
    return None


def may_force(routing: Routing) -> bool:
    """Whether the weight of a forced expert depends only on its score: moe.force supports no
    others."""
    alone = routing.after == "none" and not routing.renormalize and routing.groups == 1
    return alone and routing.score != "sparsemixer"


def with_forced(
    emit: RegionEmitter,
    choices: tuple[Value, ...],
    logits: Value,
    forced: Value,
    routing: Routing,
) -> tuple[Value, ...]:
    """The results of moe.route, changed by moe.force to include the expert that `forced` names."""
    ids = emit.reshape(emit.old(forced), logits.shape[:1])
    named = choices[0].name
    return emit("moe.force", [*choices, logits, ids], attrs=routing.attrs(), named=named)
