"""Runs a compiled model: weights are bound once, states are kept between calls.

Torch tensors give torch tensors; all other inputs give numpy arrays. Inputs that are contiguous and
aligned to 64 bytes are not copied.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import InputError
from moec.runtime.artifact import artifact
from moec.runtime.artifact.artifact import Artifact
from moec.runtime.artifact.mapped_arrays import CheckedArrays
from moec.runtime.call.account import Account
from moec.runtime.call.caches import Cache, bytes_of_caches, caches_of, keep
from moec.runtime.call.recorder import Observer, Recorder
from moec.runtime.checks import CPU, check_inputs, check_memory, destination_shapes
from moec.runtime.device.device import Cpu, Device, default_device, only_for
from moec.runtime.device.library import tvm_ffi
from moec.runtime.device.tensors import (
    aligned_copy,
    arguments_of,
    from_numpy,
    results_of,
    to_caller,
    to_numpy,
)
from moec.runtime.dtypes import NUMPY, Array
from moec.runtime.package import (
    DECODE,
    MAIN,
    RECORDED,
    RECORDED_DECODE,
    Function,
    Package,
    Port,
)


def load(path: Path | str, *, copy: bool = False) -> Executor:
    """The model in the artifact at `path`, ready to run. `copy` reads it into memory instead of
    mapping it.

    Raises ArtifactError where any part of it is damaged, or this machine cannot run it.
    """
    return start(artifact.read(path, copy=copy))


def start(opened: Artifact, device: Device | None = None) -> Executor:
    """As `load`, for an artifact that has been read. The default device is the CPU, or the first
    GPU if the artifact has code for GPUs only."""
    device = device or default_device(opened.package)
    opened = only_for(opened, device)
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(opened.verify)  # while TVM's runtime loads
        tvm_ffi()
        verified.result()
    return Executor(opened.package, device=device)


@dataclass(eq=False)
class _Entry:
    """A function of the library with its signature and its bound weights. `shapes` are those of the
    latest call's inputs, and of the outputs that are written into `memory`."""

    signature: Function
    function: Any
    params: list[Any] = field(default_factory=list)
    shapes: tuple[Any, ...] = ((), ())
    memory: list[Any] = field(default_factory=list)


_EXECUTORS: weakref.WeakSet[Executor] = weakref.WeakSet()
_FORKING = threading.RLock()
"""Held by who adds an executor, and by who forks."""


def _before_fork() -> None:
    """A fork waits for the calls of other threads: in the middle of one, TVM's virtual machine
    would stay there for ever in the child."""
    _FORKING.acquire()
    for executor in _EXECUTORS:
        executor._lock.acquire()


def _after_fork_in_parent() -> None:
    for executor in _EXECUTORS:
        executor._lock.release()
    _FORKING.release()


def _after_fork_in_child() -> None:
    for executor in _EXECUTORS:
        executor._lock.release()
        executor._caller = ThreadPoolExecutor(1, "moec")
    _FORKING.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


class Executor:
    """A model ready to run. Safe to call from several threads: calls take turns.

    A forked process has none of the worker threads of kernels. The pool (pool.py) starts new ones;
    TVM's pool, which some libraries use, would deadlock. As TVM has a pool for each calling thread,
    a forked process calls the functions from a new thread.
    """

    holds_all_texts = True

    def __init__(
        self,
        package: Package,
        functions: Mapping[str, Any] | None = None,
        device: Device | None = None,
    ) -> None:
        """Open the library, unless its functions (for a CPU) are given, and bind the weights.

        Raises ArtifactError where they do not fit.
        """
        self.package = package
        self.device = device or (default_device(package) if functions is None else Cpu())
        functions = functions or self.device.functions(package)
        self._entries = {n: _Entry(f, functions[n]) for n, f in package.functions.items()}
        self._main = self._entries[MAIN]
        self._lock = threading.RLock()  # of a thread that forks in a call, too
        self._caller: ThreadPoolExecutor | None = None
        self._recorder: Observer | None = None
        # On GPUs the rows of a text have other bits than alone.
        self.account = Account() if self.device.kind == CPU else None
        self._requests = 0
        self._counts: list[Any] = []  # the latest inputs of `decode`, whose memory the next take
        arrays = package.arrays
        self._checked = arrays if isinstance(arrays, CheckedArrays) else None
        self.bind(package.arrays)
        self._states: dict[str, Any] = {}
        self.reset()
        with _FORKING:
            _EXECUTORS.add(self)

    def _invoke(self, entry: _Entry, arguments: Sequence[Any]) -> Any:
        if self._checked is not None:
            self._checked.check_unchanged()
        if self._caller is None:
            return entry.function(*arguments, *entry.params)
        return self._caller.submit(entry.function, *arguments, *entry.params).result()

    def bind(self, arrays: Mapping[str, Any]) -> None:
        """Replace the weights, by name and packed like those of the package: numpy arrays, or torch
        tensors on the model's device, whose memory is shared."""
        if arrays is not self.package.arrays:
            self._checked = None
        with self._lock:
            self._arrays = {name: arrays[name] for name in self.package.params}  # keeps the memory
            self.device.reserve(sum(array.nbytes for array in self._arrays.values()))
            tensors = {name: self._on_device(array) for name, array in self._arrays.items()}
            self._owned = {tensor.data_ptr() for tensor in tensors.values()}
            for entry in self._entries.values():
                entry.params = [tensors[port.name] for port in entry.signature.params]

    def _on_device(self, array: Any) -> Any:
        """A weight as a tensor of the device; a torch tensor must be there already."""
        if isinstance(array, np.ndarray):
            return self.device.moved(from_numpy(array))
        (tensor,), _ = arguments_of([array])
        return tensor

    def reset(self) -> None:
        """Reset every state to its initial content."""
        states = {}
        for name, port in self.package.states.items():
            if port.initial:
                array = self.package.arrays[port.initial]
            else:
                array = np.zeros(tuple(int(size) for size in port.shape), NUMPY[port.dtype])
            states[name] = self.device.moved(from_numpy(aligned_copy(array)))
        with self._lock:
            self._states = states

    def start_recording(self, recorder: Observer) -> None:
        """Add the choices of each call to `recorder`, see `moec.runtime.call.recorder`."""
        with self._lock:
            if self._recorder is not None:
                raise InputError(
                    "the routing of this model is already being recorded: end that recording first"
                )
            self._recorder = recorder
            self._pause(True)

    def stop_recording(self) -> None:
        with self._lock:
            self._recorder = None
            self._pause(False)

    def _pause(self, paused: bool) -> None:
        if self.account is not None:
            self.account.paused = paused

    def number_requests(self, count: int) -> Array:
        """The numbers i32[count] of the next requests, which identify them in traces."""
        with self._lock:
            first, self._requests = self._requests, self._requests + count
        return np.arange(first, first + count, dtype=np.int32)

    def __call__(
        self, inputs: Mapping[str, Any], function: str = MAIN, caches: Sequence[Cache] = ()
    ) -> dict[str, Any]:
        """The outputs of a function by name, as torch tensors or numpy arrays like the inputs.
        `caches`, in the order of the signature, are updated.

        Raises InputError, before anything runs, for a wrong input or an unknown function.
        """
        if function not in self._entries:
            names = ", ".join(self._entries)
            raise InputError(f"the model has no function {function!r}; it has {names}")
        entry, sizes = self._entry_for(function, inputs)
        check_memory(entry.signature, sizes, self.device.free_memory)
        return self._call(entry, [inputs[port.name] for port in entry.signature.inputs], caches)

    def _entry_for(
        self, function: str, inputs: Mapping[str, Any]
    ) -> tuple[_Entry, Mapping[str, int]]:
        """The function to call and its sizes: for `main`, the first of it and its sides whose
        bounds allow the inputs."""
        refusals = []
        for name in (function, *(self.package.sides if function == MAIN else ())):
            entry = self._entries[name]
            try:
                return entry, check_inputs(entry.signature, inputs, self.device.takes)
            except InputError as error:
                refusals.append(error)
        if len({*map(str, refusals)}) == 1:
            raise refusals[0]
        raise InputError("; and ".join(map(str, refusals)))

    def run(
        self, inputs: Sequence[Any], function: str = MAIN, caches: Sequence[Cache] = ()
    ) -> dict[str, Any]:
        """As a call, with inputs in the order of the function's ports, without checking them."""
        return self._call(self._entries[function], inputs, caches)

    def _call(
        self, entry: _Entry, inputs: Sequence[Any], caches: Sequence[Cache] = ()
    ) -> dict[str, Any]:
        arguments, torch = arguments_of(inputs)
        shape: Sequence[int] = arguments[0].shape if arguments else ()
        requests = self.number_requests(int(shape[0]) if len(shape) else 1)
        with self._lock, _refusals(self.device), self.device.running():
            arguments = self.device.arguments(arguments)
            recorder = self._recorder if entry is self._main else None
            if recorder:
                entry = self._entries[RECORDED]
            outputs, states = entry.signature.outputs, entry.signature.states
            before = [self._states[port.name] for port in states]
            held = [cache.tensor for cache in caches]
            memory = self._destinations(entry, inputs) if entry.signature.destinations else {}
            raw = self._invoke(entry, [*arguments, *before, *held, *memory.values()])
            count = len(outputs)
            end = count + len(states)
            results = results_of(raw, end + len(caches))
            keep(caches, entry.signature.caches, results[end:])
            results[:count] = self.device.results(results[:count], memory)
            shared = (*arguments, *before, *held, *results[count:])
            self._states |= {p.name: t for p, t in zip(states, results[count:end], strict=True)}
            if recorder:
                count -= len(recorder.layers)
                choices = zip(results[count:], outputs[count:], strict=False)
                to_host = self.device.to_host
                recorder.add_main([to_numpy(to_host(r), port) for r, port in choices], requests)
            return self._returned(results[:count], outputs[:count], shared, torch)

    def _destinations(self, entry: _Entry, inputs: Sequence[Any]) -> dict[int, Any]:
        """Memory for outputs of a call, by the index of the output."""
        function = entry.signature
        lengths = [tuple(value.shape) for value in inputs]
        if entry.shapes[0] != lengths:
            names = (port.name for port in function.inputs)
            named = dict(zip(names, inputs, strict=True))
            entry.shapes = (lengths, destination_shapes(function, named))
        before = entry.memory or [None] * len(function.destinations)
        memory = [
            self.device.destination(port, shape, latest)
            for (port, shape), latest in zip(entry.shapes[1], before, strict=True)
        ]
        if self.device.takes == CPU:  # else the caller alone decides how long results are kept
            entry.memory = memory
        indices = [n for n, p in enumerate(function.outputs) if p.name in function.destinations]
        return dict(zip(indices, memory, strict=True))

    def _returned(
        self, results: Sequence[Any], ports: Sequence[Port], shared: Sequence[Any], torch: Any
    ) -> dict[str, Any]:
        """Results for the caller, copied if their memory is `shared` or a weight's."""
        addresses = [tensor.data_ptr() for tensor in shared]
        returned = {}
        for port, result in zip(ports, results, strict=True):
            address = result.data_ptr()
            copied = address in addresses or address in self._owned
            returned[port.name] = to_caller(result, port, torch, copied)
        return returned

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        """Logits f32[B, Q, V] of the function `decode`, which updates `caches`.

        `counts` are input_ids, first, rows and last, all i64; the caller must ensure that they are
        within their bounds. For recordings, `requests` i32[B] are the numbers of the texts, and
        `lengths` i64[B] the number of tokens of each that are no padding.
        """
        held = [cache.tensor for cache in caches]
        item = tvm_ffi().get_global_func("ffi.ArrayGetItem")
        with self._lock, _refusals(self.device):
            recorder = self._recorder
            entry = self._entries[RECORDED_DECODE if recorder else DECODE]
            logits, *layers = entry.signature.outputs
            moved, before = self.device.moved, self._counts or [None] * len(counts)
            self._counts = list(map(moved, map(from_numpy, counts), before))
            arguments = [*self._counts, *held]
            results = self._invoke(entry, arguments)
            scores = to_numpy(self.device.to_host(item(results, 0)), logits)
            if recorder:
                to_host = self.device.to_host
                raw = [to_host(item(results, n)) for n in range(1, len(layers) + 1)]
                choices = list(map(np.from_dlpack, raw))  # ids are integers that numpy has
                recorder.add_decode(choices, lengths, counts[0].shape[1], requests)
            after = [item(results, 1 + len(layers) + index) for index in range(len(caches))]
            keep(caches, entry.signature.caches, after)
        return scores.astype(np.float32)

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        """Caches of the function `decode` for some texts of at most `room` tokens each."""
        ports = self.package.functions[DECODE].caches
        self.device.check_caches(bytes_of_caches(ports, texts, room))
        return caches_of(ports, texts, room, self.device)

    def states(self) -> dict[str, Array]:
        """Copies of the current contents of the states, by name."""
        with self._lock:
            ports = self.package.states
            return {n: to_numpy(value, ports[n]).copy() for n, value in self._states.items()}


@contextmanager
def _refusals(device: Device) -> Iterator[None]:
    """Raises InputError where compiled code refuses its arguments (for sizes that no axis
    determines, or after a forged manifest), and the device's own error where it fails."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise device.refusal(line) from error


@contextmanager
def record_routing(executor: Executor) -> Iterator[Recorder]:
    """Record every call of the executor, from any thread, until the end of the block.

    Raises InputError where the model was compiled without `record_routing`, or is being recorded.
    """
    layers = executor.package.recorded
    if not layers:
        raise InputError(
            "this model cannot record routing: compile it with --record-routing "
            "(record_routing=True in Python)"
        )
    recorder = Recorder(layers)
    executor.start_recording(recorder)
    try:
        yield recorder
    finally:
        executor.stop_recording()
