"""Compiles the segments of a rank's function into one library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from moec.codegen.backends import backend_for
from moec.codegen.lower import LoweredModule, lower
from moec.codegen.module_builder import as_array
from moec.codegen.package import generation_of, package, port, signature
from moec.errors import UnsupportedError
from moec.ir.graph import Graph, Module, Op, Program, Stage
from moec.ir.text import print_graph
from moec.parallel.cut import Segment, cut
from moec.parallel.segments import RankCode, table_name
from moec.passes.core.runner import run
from moec.pipeline import LEVELS, LOWER, decode_passes
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE, BuiltLibrary, grows
from moec.target.base import Target

OPT_LEVEL = 2


def compile_function(
    programs: Iterable[Program], function: str, target: Target
) -> Iterator[RankCode]:
    """Compile one function of each rank, in stage MOE. Ranks whose graphs differ only in weights
    share one library.

    Raises UnsupportedError for an op without a kernel, and for a state that is no cache of keys and
    values.
    """
    backend = backend_for(target)
    libraries: dict[str, tuple[LoweredModule, BuiltLibrary]] = {}
    passes = (*LOWER.at_level(max(LEVELS)), *decode_passes(max(LEVELS)))
    for program in programs:
        _check_states(program.graph)
        rank = run(program, passes, stage=Stage.MOE)[-1].program
        module, tables = _segments(rank)
        text = print_graph(rank.graph)
        if text not in libraries:
            lowered = lower(module, target, backend)
            libraries[text] = lowered, backend.library(lowered.modules, target, OPT_LEVEL, None)
        code = package(module, target, *libraries[text])
        function_type = signature(function, program, ())
        generation = generation_of(function_type) if function == DECODE else None
        code = replace(code, arrays={**code.arrays, **tables})
        yield RankCode(rank.graph, function_type, code, generation)


def _check_states(graph: Graph) -> None:
    for state in graph.states:
        if not grows(port(state.before)):
            raise UnsupportedError(
                f"the state {state.before.name} is not a cache of keys and values, and cannot be "
                "split over ranks"
            )


def _segments(program: Program) -> tuple[Module, dict[str, Array]]:
    """The segments as a module, and the params that ops in torch read."""
    parts: dict[str, Program] = {}
    tables: dict[str, Array] = {}
    for item in cut(program.graph):
        if isinstance(item, Segment):
            used = {param.name: program.weights[param.name] for param in item.graph.params}
            parts[item.name] = Program(item.graph, used)
        else:
            tables |= _tables(item, program)
    return Module(parts), tables


def _tables(op: Op, program: Program) -> dict[str, Array]:
    read = [value for value in op.inputs if value in program.graph.params]
    return {table_name(param): as_array(program.weights[param.name]) for param in read}
