"""Attention on GPUs: on tensor cores where a tile supports it, and by warps otherwise."""

from __future__ import annotations

from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.backend import Rule
from moec.codegen.cuda.attention.key_tiles import key_tile
from moec.codegen.cuda.attention.tiles import tile_attention
from moec.codegen.cuda.attention.warps import attention
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.attention import OPS, attention_inputs, call_attention, spec_of
from moec.ir.graph import Graph, Op


def _check_tiles(op: Op, graph: Graph) -> None:
    key_tile(spec_of(attention_inputs(op)))


def _tiles(low: Lowering, op: Op) -> list[relax.Expr]:
    a = attention_inputs(op)
    spec = spec_of(a)

    def make(name: str) -> PrimFunc:
        return tile_attention(spec, low.target, name)

    function = low.function(("tiles", spec), "tile_attention", make)
    return call_attention(low, op, a, function, "tile_attention")


def _check(op: Op, graph: Graph) -> None:
    attention_inputs(op)


def _warps(low: Lowering, op: Op) -> list[relax.Expr]:
    a = attention_inputs(op)
    spec = spec_of(a)

    def make(name: str) -> PrimFunc:
        return attention(spec, low.target, name)

    function = low.function(("warps", spec), "attention", make)
    return call_attention(low, op, a, function, "attention")


RULES = (
    Rule("tile_attention", OPS, _check_tiles, _tiles),
    Rule("attention", OPS, _check, _warps),
)
