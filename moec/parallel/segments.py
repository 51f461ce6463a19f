"""One rank's function: compiled segments, with exchanges in torch between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moec.ir.graph import Graph, Op, Value
from moec.ir.interpret.evaluate import run_op
from moec.ir.opdef import Reference
from moec.ir.sizes.dims import bind_shape
from moec.parallel.cut import cut
from moec.runtime.artifact.mapped_arrays import CheckedArrays
from moec.runtime.call.caches import Cache
from moec.runtime.call.executor import Executor
from moec.runtime.checks import check_inputs
from moec.runtime.device.device import Device
from moec.runtime.device.tensors import from_numpy, to_caller
from moec.runtime.package import Function, Generation, Package, Port


@dataclass(frozen=True)
class RankCode:
    """One function of one rank. `graph` is in stage GROUPED, `signature` is that of the complete
    function. `package` has its segments, and arrays also for the params that ops in torch read
    (`table_name`). `generation` is that of `decode`."""

    graph: Graph
    signature: Function
    package: Package
    generation: Generation | None = None


def table_name(param: Value) -> str:
    """The name of a param's array for ops in torch; kernels may need the same param packed."""
    return f"tables/{param.name}"


class RankModel:
    """A function of a rank, ready to run on a device, by default on the CPU or the first GPU, as
    its code is. Tensors are on it (`Device.takes`) from the inputs to the outputs."""

    def __init__(self, code: RankCode, device: Device | None = None) -> None:
        self.graph = code.graph
        self.schedule = cut(self.graph)
        self._signature = code.signature
        arrays = code.package.arrays
        # Once in a call of the rank, whose weights are many files, instead of once in each segment.
        self._checked = arrays if isinstance(arrays, CheckedArrays) else None
        self.executor = Executor(replace(code.package, arrays=dict(arrays)), device=device)
        self.tables = {
            value: _tensor(value, code.package).to(self.executor.device.takes)
            for item in self.schedule
            if isinstance(item, Op)
            for value in item.inputs
            if value in self.graph.params
        }

    def __call__(
        self,
        inputs: Sequence[torch.Tensor],
        meanings: Mapping[str, Reference],
        caches: Sequence[Cache] = (),
    ) -> tuple[torch.Tensor, ...]:
        """The graph's outputs. Writes `caches`, the contents of its states. Raises RankError where
        an exchange fails, InputError for wrong inputs, and ArtifactError where a file of weights
        was written to."""
        if self._checked is not None:
            self._checked.check_unchanged()
        names = (port.name for port in self._signature.inputs)
        named = dict(zip(names, inputs, strict=True))
        check_inputs(self._signature, named, self.executor.device.takes)
        graph = self.graph
        states = [state.before for state in graph.states]
        held = dict(zip(states, caches, strict=True))
        sizes: dict[str, int] = {}
        for state, cache in held.items():
            bind_shape(state.shape, cache.shape, sizes)
        values: dict[Value, torch.Tensor] = {}

        def learn(value: Value, tensor: torch.Tensor) -> None:
            bind_shape(value.shape, tuple(tensor.shape), sizes)
            values[value] = tensor

        free = [value for value in graph.inputs if value not in held]
        for value, tensor in zip(free, inputs, strict=True):
            learn(value, tensor)
        values |= self.tables
        for item in self.schedule:
            if isinstance(item, Op):
                results = run_op(item, [values[v] for v in item.inputs], sizes, meanings)
                if item.name == "moec.size":
                    sizes[str(item.attrs["name"])] = int(results[0])
                outputs: Sequence[Value] = item.outputs
            else:
                part = item.graph
                feeds = [values[v] for v in part.inputs if v not in held]
                written = [held[state.before] for state in part.states]
                arrays = self.executor.run(feeds, item.name, written)
                outputs, results = part.outputs, tuple(arrays[v.name] for v in part.outputs)
            for value, tensor in zip(outputs, results, strict=True):
                learn(value, tensor)
        return tuple(values[value] for value in graph.outputs)


def _tensor(param: Value, package: Package) -> torch.Tensor:
    port = Port(param.name, param.dtype, tuple(int(size) for size in param.shape))
    array = from_numpy(package.arrays[table_name(param)])
    tensor: torch.Tensor = to_caller(array, port, torch, copied=True)
    return tensor
