"""Compiles a region: runs the passes after recognition, and generates and packs its kernels.

Code contains no names and no weights of the model, so that layers with equal regions share it. What
passes compute from weights alone is kept as a graph, which is evaluated again when a weight
changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch

from moec.cache import LIBRARIES, key_of, load, save, source_version
from moec.codegen.backend import Backend
from moec.codegen.backends import backend_for
from moec.codegen.lower import LoweredModule, lower
from moec.codegen.package import package, packed_arrays
from moec.dynamo.graph.regions import Region
from moec.dynamo.options import Options, exact
from moec.dynamo.record import RECORDER
from moec.errors import NoMatch
from moec.ir.canonical import without_origins
from moec.ir.graph import Graph, Module, Op, Program, Stage, Value
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import print_graph
from moec.passes.core.runner import PassResult, run
from moec.pipeline import TRAIN, after_recognition
from moec.runtime.package import MAIN, BuiltLibrary, Package
from moec.sources.memory.memory import InMemory


@dataclass(frozen=True)
class Code:
    """The code of a region. `graph` is the region in stage MOE; its inputs and params are the
    arguments of a call.

    `expanded` is the same graph with the bodies of experts applied to all rows, for training.
    `folded` computes the weights that the kernels read from the params. `package` holds no arrays.
    """

    key: str
    graph: Graph
    expanded: Graph
    folded: Graph
    lowered: LoweredModule
    package: Package

    @cached_property
    def packing(self) -> str:
        """A key of the packed arrays: equal for codes that read the same ones, such as codes for
        other token counts."""
        arrays = [(param.name, param.type) for param in self.lowered.params[MAIN]]
        kernels = [kernel for _, kernel in self.package.kernels]
        return key_of(print_graph(self.folded), arrays, kernels, self.package.target)

    def arrays(self, weights: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The kernels' packed weights by name. `weights` are in the order of the region's params;
        further tensors (ids and masks that recognition read) may follow and are ignored."""
        weights_by_name = {p.name: w for p, w in zip(self.graph.params, weights, strict=False)}
        results = evaluate(self.folded, [], weights_by_name)
        named = {v.name: t for v, t in zip(self.folded.outputs, results, strict=True)}
        params = self.lowered.params[MAIN]
        if self.package.gpu is None:
            return packed_arrays(params, named, InMemory())
        # On a GPU, kernels read weights that they do not pack where PyTorch has them.
        arrays: dict[str, Any] = {}
        for param in params:
            if param.pack is None:
                arrays[param.name] = named[param.values[0].name].detach().contiguous()
            else:
                on_host = {value.name: named[value.name].cpu() for value in param.values}
                arrays |= packed_arrays((param,), on_host, InMemory())
        return arrays


def generate(region: Region, options: Options, codes: Mapping[str, Code]) -> Code:
    """The code of a region: that of an equal region in `codes`, from the cache, or compiled.

    Raises MoecError where the region cannot be compiled.
    """
    graph = without_origins(region.program.graph)
    names = zip(graph.params, region.program.graph.params, strict=True)
    weights = {new.name: region.program.weights[old.name] for new, old in names}
    key = _key(graph, weights, options)
    if key in codes:
        RECORDER.add(cache_hits=1)
        return codes[key]
    passes = after_recognition(exact(options))
    pass_results = run(Program(graph, weights), passes, stage=Stage.MOE)
    final = pass_results[-1].program
    module = Module.of(final)
    assert options.target is not None
    backend = backend_for(options.target)
    lowered = lower(module, options.target, backend)
    bare = package(module, options.target, lowered, BuiltLibrary(), weights=False)
    library = _library(backend, lowered, options, key)
    native = replace(bare, library=library.host, gpu=library.gpu)
    trained = run(Program(graph, weights), TRAIN.passes, stage=Stage.MOE)
    return Code(
        key, graph, trained[-1].program.graph, _folded(pass_results, graph), lowered, native
    )


def _library(backend: Backend, lowered: LoweredModule, options: Options, key: str) -> BuiltLibrary:
    """From the cache, or compiled. Of GPUs, only the kernels' machine code is in the cache."""
    library = load(options.cache, LIBRARIES, key)
    if library is not None:
        RECORDER.add(disk_hits=1)
        return BuiltLibrary(library)
    built = backend.library(lowered.modules, options.target, options.opt_level, options.cache)
    RECORDER.add(code_compiled=1)
    if built.gpu is None:
        save(options.cache, LIBRARIES, {key: built.host})
    return built


def _key(graph: Graph, weights: Mapping[str, torch.Tensor], options: Options) -> str:
    constants = [
        (name, tensor.tolist())
        for name, tensor in weights.items()
        if is_constant(tensor) and tensor.numel() < 4096
    ]
    versions = [source_version(), *(version(name) for name in ("apache-tvm", "torch"))]
    passes = [repr(pass_) for pass_ in exact(options)]
    return key_of(
        print_graph(graph), constants, options.target, options.opt_level, passes, versions
    )


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether recognition may have relied on the tensor's values: integers, booleans."""
    return not tensor.is_floating_point()


def _folded(pass_results: Sequence[PassResult], graph: Graph) -> Graph:
    """The graph that computes the params of the last pass's graph from those of the first."""
    makers: dict[Value, Op] = {}
    for pass_result in pass_results:
        for op in pass_result.program.graph.ops:
            makers |= dict.fromkeys(op.outputs, op)
    final = pass_results[-1].program.graph.params
    ops: dict[Op, None] = {}

    def make(value: Value) -> None:
        if value in graph.params:
            return
        op = makers.get(value)
        if op is None:
            raise NoMatch(f"{value.name} is made of no weight")
        for source in op.inputs:
            make(source)
        ops[op] = None

    for value in final:
        make(value)
    return Graph((), graph.params, tuple(ops), final, name="weights")
