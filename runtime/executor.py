"""Runs a compiled model: weights bound once, states kept between calls.

Torch tensors in, torch tensors out; else numpy. Neither is copied where its memory is as the
kernels need it: contiguous, and aligned to 64 bytes.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import InputError
from moec.runtime import artifact
from moec.runtime.artifact import Artifact
from moec.runtime.checks import check_inputs
from moec.runtime.dtypes import NUMPY, Array
from moec.runtime.library import open_library, tvm_ffi
from moec.runtime.package import MAIN, ROUTE, ROUTED, STEP, Package, Port, Routers, grows

ALIGNMENT = 64  # bytes: what kernels assume of every address


def load(path: Path | str) -> Executor:
    """The model in the artifact at `path`, ready to run.

    Raises ArtifactError where any part of it is damaged, or this machine cannot run it.
    """
    return start(artifact.read(path))


def start(opened: Artifact, *, rebuilt: bool = False) -> Executor:
    """As `load`, for an artifact that was read before.

    `rebuilt` compiles its graph anew instead of using the code in it.
    """
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(opened.verify)  # while TVM's runtime loads
        tvm_ffi()
        verified.result()
    if not rebuilt:
        return Executor(opened.package)
    from moec.runtime.rebuild import rebuild  # the compiler: slow to import, and seldom needed

    return Executor(rebuild(opened))


class Executor:
    """A model ready to run. Safe to call from several threads: calls take turns."""

    def __init__(self, package: Package) -> None:
        """Open the library and bind the weights. Raises ArtifactError where they do not fit."""
        self.package = package
        self._vm = open_library(package.library)
        self._main = self._vm[MAIN]
        self._step: Any = self._vm[STEP] if package.step is not None else None
        routers = package.routers
        self._route: Any = self._vm[ROUTE] if routers is not None else None
        self._routed: Any = self._vm[ROUTED] if routers is not None else None
        self._lock = threading.Lock()
        self.bind(package.arrays)
        self._states: list[Any] = []
        self.reset()

    def bind(self, arrays: Mapping[str, Any]) -> None:
        """Run with these weights, by name and packed as the package's are, from now on."""
        ports, routers = self.package.every_param, self.package.routers
        with self._lock:
            self._arrays = {port.name: arrays[port.name] for port in ports}  # own the memory
            bound = {name: _from_numpy(array) for name, array in self._arrays.items()}
            self._owned = {tensor.data_ptr() for tensor in bound.values()}
            self._params = [bound[port.name] for port in self.package.params]
            if self.package.step is not None:
                self._step_params = [bound[port.name] for port in self.package.step.params]
            if routers is not None:
                self._route_params = [bound[port.name] for port in routers.route]
                self._routed_params = [bound[port.name] for port in routers.routed]

    def reset(self) -> None:
        """Put every state back to what it starts from."""
        states = []
        for port in self.package.states:
            if port.initial:
                states.append(_from_numpy(_aligned_copy(self.package.arrays[port.initial])))
            else:
                shape = tuple(int(size) for size in port.shape)
                states.append(_from_numpy(_aligned_copy(np.zeros(shape, NUMPY[port.dtype]))))
        with self._lock:
            self._states = states

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, of the kind of the inputs.

        Raises InputError, before anything runs, where an input is not what the model takes.
        """
        return self._run(self._main, self._params, inputs)

    def route(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of `Routers.route` by name, of the kind of the inputs.

        Raises InputError, before anything runs, where an input is not what the routers take.
        """
        routers = self._routers()
        own = replace(self.package, inputs=routers.inputs)
        check_inputs(own, inputs)
        taken, torch = _taken([inputs[port.name] for port in routers.inputs])
        with self._lock:
            made = self._route(*taken, *self._route_params)
            results = _results(made, len(routers.outputs))
            return self._given(results, routers.outputs, taken, torch)

    def routed(self, inputs: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
        """As a call with `inputs`, with `choices` of `route` for the routers that it computes.

        Raises InputError, before anything runs, where either does not fit.
        """
        self._routers()
        return self._run(self._routed, self._routed_params, inputs, choices)

    def _routers(self) -> Routers:
        if self.package.routers is None:
            raise InputError(
                "no router of this model is a function of its own: compile it with "
                "--passes +hoist-routers, and see its report"
            )
        return self.package.routers

    def _run(
        self,
        function: Any,
        params: Sequence[Any],
        inputs: Mapping[str, Any],
        choices: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        own = self.package
        if choices is not None:
            own = replace(own, inputs=(*own.inputs, *self._routers().outputs))
            inputs = {**inputs, **choices}
        check_inputs(own, inputs)
        return self._checked(function, params, [inputs[port.name] for port in own.inputs])

    def run(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """As a call, for inputs in the order of the package's that were checked before."""
        return self._checked(self._main, self._params, inputs)

    def _checked(
        self, function: Any, params: Sequence[Any], inputs: Sequence[Any]
    ) -> dict[str, Any]:
        taken, torch = _taken(inputs)
        outputs = self.package.outputs
        with self._lock:
            made = function(*taken, *self._states, *params)
            count = len(outputs)
            results = _results(made, count + len(self._states))
            shared = (*taken, *self._states, *results[count:])
            self._states = results[count:]
            return self._given(results[:count], outputs, shared, torch)

    def _given(
        self, results: Sequence[Any], ports: Sequence[Port], shared: Sequence[Any], torch: Any
    ) -> dict[str, Any]:
        """Results as the caller gets them: in memory that is not `shared`, nor a weight's."""
        places = [tensor.data_ptr() for tensor in shared]
        given = {}
        for port, result in zip(ports, results, strict=True):
            place = result.data_ptr()
            copied = place in places or place in self._owned
            given[port.name] = _give(result, port, torch, copied)
        return given

    def step(self, counts: Sequence[Array], caches: Sequence[Cache]) -> Array:
        """Logits f32[B, V] of `Step`, which writes into `caches`.

        `counts` are input_ids, first, rows and last, all i64 and within their bounds: the
        caller has seen to that.
        """
        step = self.package.step
        assert step is not None
        taken = [*map(_from_numpy, counts), *(cache.tensor for cache in caches)]
        result = tvm_ffi().get_global_func("ffi.ArrayGetItem")
        with self._lock:
            results = self._step(*taken, *self._step_params)
            made = _to_numpy(result(results, 0), step.logits)
            for place, (port, cache) in enumerate(zip(step.caches, caches, strict=True), 1):
                if not grows(port):  # the others were written in place
                    cache.array[...] = _to_numpy(result(results, place), port)
        return made[:, 0].astype(np.float32)

    def states(self) -> dict[str, Array]:
        """Copies of what the states hold now, by name."""
        with self._lock:
            pairs = zip(self.package.states, self._states, strict=True)
            return {port.name: _to_numpy(value, port).copy() for port, value in pairs}


def _taken(inputs: Sequence[Any]) -> tuple[list[Any], Any]:
    """The inputs as tensors of TVM, and the module torch where any of them is torch's."""
    torch = sys.modules.get("torch")
    taken, found = [], None
    for value in inputs:
        if torch is not None and isinstance(value, torch.Tensor):
            found = torch
            taken.append(_from_torch(value, torch))
        else:
            taken.append(_from_numpy(np.asarray(value)))
    return taken, found


def _from_torch(value: Any, torch: Any) -> Any:
    """A tensor of TVM that shares the memory where it can."""
    tensor = value.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.contiguous()
    if tensor.data_ptr() % ALIGNMENT:
        tensor = tensor.clone()
    return _compact(tvm_ffi().from_dlpack(tensor))


def _from_numpy(array: Array) -> Any:
    if array.dtype == NUMPY["c64"]:
        array = array[..., None].view(np.float32)
    aligned = array.ctypes.data % ALIGNMENT == 0 or array.size == 0
    if not (aligned and array.flags.c_contiguous and array.flags.writeable):
        array = _aligned_copy(array)  # DLPack has no way to say that memory is read-only
    if array.dtype == NUMPY["bf16"]:  # numpy exports it as nothing at all
        return _view(tvm_ffi().from_dlpack(array.view(np.uint16)), "bfloat16")
    return _compact(tvm_ffi().from_dlpack(array))


@dataclass(frozen=True, eq=False)
class Cache:
    """What texts keep from piece to piece: the same memory for numpy and for compiled code, which
    takes it anew for each token."""

    array: Array
    tensor: Any

    @staticmethod
    def of(shape: tuple[int, ...], dtype: Any) -> Cache:
        array = empty(shape, dtype)
        return Cache(array, _from_numpy(array))


def _aligned_copy(array: Array) -> Array:
    made = empty(array.shape, array.dtype)
    made[...] = array
    return made


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of anything, at an address that kernels take as it is."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    made: Array = room[start : start + nbytes].view(dtype).reshape(shape)
    return made


def _results(made: Any, count: int) -> list[Any]:
    """What a function of the library gave, taken apart without the Python of a container."""
    if hasattr(made, "data_ptr"):
        return [made]
    item = tvm_ffi().get_global_func("ffi.ArrayGetItem")
    return [item(made, index) for index in range(count)]


def _compact(tensor: Any) -> Any:
    """The same memory with the strides that compiled code insists on.

    numpy and torch give axes of an empty tensor, or of size 1, whatever strides they like.
    """
    wanted = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if stride != wanted:
            return _view(tensor, tensor.dtype)
        wanted *= size
    return tensor


def _view(tensor: Any, dtype: str) -> Any:
    """The same memory as `dtype`, with strides as in `_compact`."""
    ffi = tvm_ffi()
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    return view(tensor, ffi.Shape(tensor.shape), ffi.dtype(dtype), 0)


def _to_numpy(tensor: Any, port: Port) -> Array:
    bf16 = port.dtype == "bf16"
    array: Array = np.from_dlpack(_view(tensor, "uint16") if bf16 else tensor)
    if port.dtype == "c64":
        return array.view(np.complex64)[..., 0]
    return array.view(NUMPY["bf16"]) if bf16 else array


def _give(tensor: Any, port: Port, torch: Any, copied: bool) -> Any:
    if torch is None:
        array = _to_numpy(tensor, port)
        return array.copy() if copied or not array.flags.writeable else array
    made = torch.from_dlpack(tensor.__dlpack__())  # of the capsule torch asks no more
    if port.dtype == "c64":
        made = torch.view_as_complex(made)
    return made.clone() if copied else made
