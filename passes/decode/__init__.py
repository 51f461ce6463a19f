"""The decode program: one step of text generation, derived from a causal language model.

    f(input_ids[B, S]) -> logits[B, S, V]
    ->
    step(input_ids[B, S], first[B], rows[B, Q], last[B]; caches[B, heads, L, width] ..)
        -> logits[B, Q, V]

The step takes the next S tokens of each sequence: a prompt, a chunk of one, or one token. It is
derived from the graph after the other passes, so the captured model needs no cache, and every model
whose tokens interact by causal attention alone can be rewritten.
"""

from __future__ import annotations

from dataclasses import replace

from moec.errors import NoMatch
from moec.ir.graph import Graph, Program, Stage, Value
from moec.ir.interpret.verifier import verify
from moec.oracle.table_ids import table_rows
from moec.passes.decode.kv_cache import FIRST, ROOM, with_caches
from moec.passes.decode.kv_inputs import with_past
from moec.passes.decode.last_token import LAST, ROWS, last_only

__all__ = [
    "FIRST",
    "LAST",
    "ROOM",
    "ROWS",
    "continues_text",
    "incremental",
    "logits_of",
    "past_and_present",
]


def continues_text(graph: Graph) -> bool:
    """Whether a graph goes from token ids to logits, as a model that generates text does."""
    try:
        logits_of(graph)
    except NoMatch:
        return False
    return any(value.dtype == "i64" and len(value.shape) == 2 for value in graph.inputs)


def incremental(program: Program) -> Program:
    """The decode program. Raises NoMatch with the reason where tokens cannot come in chunks."""
    graph = program.graph
    rewritten = last_only(with_caches(replace(graph, outputs=(logits_of(graph),))))
    verify(rewritten, Stage.GROUPED)
    return Program(
        rewritten, {param.name: program.weights[param.name] for param in rewritten.params}
    )


def with_past_inputs(program: Program) -> Program:
    """The program with past keys and values as inputs (kv_inputs.py), and logits of all tokens.

    Raises NoMatch with the reason where tokens cannot come in chunks.
    """
    graph = program.graph
    rewritten = with_past(replace(graph, outputs=(logits_of(graph),)))
    verify(rewritten, Stage.GROUPED)
    return Program(
        rewritten, {param.name: program.weights[param.name] for param in rewritten.params}
    )


def logits_of(graph: Graph) -> Value:
    """The output [B, S, V] with a score for each of the V rows of the embedding table."""
    tables = [table_rows(graph, value) for value in graph.inputs]
    for value in graph.outputs:
        scores = value.name == "logits" or (bool(value.shape) and value.shape[-1] in tables)
        if scores and len(value.shape) == 3 and value.dtype in ("f32", "bf16", "f16"):
            return value
    raise NoMatch("the model returns no logits [B, S, V]")
