"""The store of experts on GPUs, with a CUDA runtime of this file: whatever the routing, each launch
finds each of its experts in its slot, on streams that are late.

A product's weights are one number for each expert; a launch reads them from slots.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.backends.cuda.library import STORE
from moec.runtime.expert_store.gpu_native import (
    NativeArray,
    NativeOptions,
    NativeProduct,
)
from moec.runtime.expert_store.native import POLICIES, StackInSlots, StoreOptions, options_of

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")

PRODUCTS = 2
KERNELS, COPIES = 0, 1
"""Streams."""
READ = 1
"""The event after launches; others are of copies."""
_C = ctypes.CFUNCTYPE
_INT, _POINTER = ctypes.c_int, ctypes.c_void_p


class _Any(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("zero", ctypes.c_uint32), ("value", ctypes.c_int64))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", _POINTER),
        ("device", ctypes.c_int32 * 2),
        ("axes", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", _POINTER),
        ("strides", _POINTER),
        ("offset", ctypes.c_uint64),
    )


def _tensor(array: np.ndarray) -> _Tensor:
    return _Tensor(data=array.ctypes.data)


@dataclass
class Streams:
    """What is queued on the `late` stream happens when it is waited for; on the other, at once."""

    late: int | None
    queues: tuple[list[Callable[[], None]], ...] = field(default_factory=lambda: ([], []))
    done: list[int] = field(default_factory=lambda: [0, 0])
    events: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, stream: int, step: Callable[[], None]) -> int:
        self.queues[stream].append(step)
        if stream != self.late:
            self.drain(stream)
        return 0

    def drain(self, stream: int, until: int | None = None) -> int:
        until = len(self.queues[stream]) if until is None else until
        while self.done[stream] < until:
            step = self.queues[stream][self.done[stream]]
            self.done[stream] += 1
            step()
        return 0

    def record(self, event: int, stream: int | None) -> int:
        self.events[event] = (stream or 0, len(self.queues[stream or 0]))
        return 0

    def wait(self, stream: int | None, event: int, _: int) -> int:
        awaited = self.events.get(event)
        return self.add(stream or 0, lambda: awaited and self.drain(*awaited))

    def copy(self, to: int, source: int, size: int, _: int, stream: int | None) -> int:
        return self.add(stream or 0, lambda: ctypes.memmove(to, source, size))


class Store:
    """One layer of two products, on streams of which one is late."""

    def __init__(self, library: ctypes.CDLL, experts: int, slots: int, policy: str, late: Any):
        self.library, self.experts, self.streams = library, experts, Streams(late)
        self.weights = [100 * p + np.arange(experts, dtype=np.int64) + 1 for p in range(PRODUCTS)]
        self.slots = [np.zeros(slots, np.int64) for _ in range(PRODUCTS)]
        self.table, self.on_gpu = (np.zeros(2 * experts, np.int32) for _ in range(2))
        self.ends = np.zeros(experts, np.int32)
        arrays = [
            (NativeArray * 1)(NativeArray(slots.ctypes.data, weights.ctypes.data, 8))
            for slots, weights in zip(self.slots, self.weights, strict=True)
        ]
        products = (NativeProduct * PRODUCTS)(
            *(NativeProduct(0, p, 1, PRODUCTS, array) for p, array in enumerate(arrays))
        )
        stack = StackInSlots(0, 0, 1, experts, slots, ())
        policy_options = options_of([stack], StoreOptions(policy=policy))
        streams = self.streams
        functions = (
            _C(_INT, _INT)(lambda device: 0),
            _C(_INT, _POINTER, _POINTER, ctypes.c_size_t, _INT, _POINTER)(streams.copy),
            _C(_INT, _POINTER)(lambda stream: streams.drain(stream or 0)),
            _C(_INT, _POINTER, _POINTER, ctypes.c_uint)(streams.wait),
            _C(_INT, _POINTER, _POINTER)(streams.record),
            _C(_POINTER, _INT)(lambda error: 0),
            _C(_POINTER, ctypes.c_int32, ctypes.c_int32)(lambda type, device: KERNELS),
        )
        events = (_POINTER * (PRODUCTS * experts))(*range(2, 2 + PRODUCTS * experts))
        opened = NativeOptions(
            *(ctypes.cast(function, _POINTER).value for function in functions),
            ctypes.addressof(policy_options), products, self.table.ctypes.data,
            self.ends.ctypes.data, COPIES, READ, events, 0, experts,
        )  # fmt: skip
        address, result = _Any(1, 0, ctypes.addressof(opened)), _Any()
        self._function("open")(None, ctypes.byref(address), 1, ctypes.byref(result))
        self.alive = (opened, policy_options, products, arrays, functions, events)
        self.address = result.value
        self.keys = [np.array([result.value, p], np.int64) for p in range(PRODUCTS)]
        self.multiplied: list[list[int]] = [[] for _ in range(PRODUCTS)]

    def _function(self, name: str) -> Any:
        return self.library[f"__tvm_ffi_moec_device_store_{name}"]

    def call(self, rows: Sequence[int], launches: int = 1 << 30) -> None:
        """A call of the layer, which is given up after some launches."""
        ends = np.cumsum(rows, dtype=np.int32)
        tensors = [*map(_tensor, (self.keys[0], ends, self.on_gpu))]
        arguments = (_Any * 3)(*(_Any(7, 0, ctypes.addressof(t)) for t in tensors))
        assert self._function("plan")(None, arguments, 3, ctypes.byref(_Any())) == 0
        self.multiplied = [[] for _ in range(PRODUCTS)]
        for p in range(PRODUCTS):
            key = ctypes.byref(_tensor(self.keys[p]))
            for wave in range(self.library.device_store_waves(key)):
                if not launches:
                    return
                launches -= 1
                assert self.library.device_store_begin(key, wave) == 0
                self.streams.add(
                    KERNELS, lambda p=p, wave=wave: self.launch(p, wave, self.multiplied)
                )
                assert self.library.device_store_end(key, wave) == 0
        self.kept_alive = ends  # until the launches have ended

    def launch(self, p: int, wave: int, into: list[list[int]]) -> None:
        slot, of_wave = self.on_gpu[: self.experts], self.on_gpu[self.experts :]
        into[p] += [int(self.slots[p][slot[e]]) for e in np.flatnonzero(of_wave == wave)]

    def counts(self) -> list[int]:
        raw = (ctypes.c_int64 * 6)()
        arguments = (_Any * 2)(_Any(1, 0, self.address), _Any(1, 0, ctypes.addressof(raw)))
        self._function("counts")(None, arguments, 2, ctypes.byref(_Any()))
        return list(raw)

    def close(self) -> None:
        self.streams.drain(COPIES), self.streams.drain(KERNELS)
        self._function("close")(None, ctypes.byref(_Any(1, 0, self.address)), 1, None)


def _built(folder: Path, old: str = "", new: str = "") -> ctypes.CDLL:
    text = STORE.read_text()
    assert text.count(old) == 1 or not old
    text = text.replace(old, new) if old else text
    source = folder / "store.c"
    source.write_text(text.replace("../cpu/", f"{STORE.parents[1]}/cpu/"))
    words = ["gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", str(source), "-o"]
    subprocess.run([*words, str(folder / "store.so")], check=True)
    return ctypes.CDLL(str(folder / "store.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return _built(tmp_path_factory.mktemp("store"))


@dataclass(frozen=True)
class Case:
    """Calls of a layer: the rows of each expert, and the launches after which it is given up."""

    slots: int
    policy: str
    late: int | None
    calls: tuple[tuple[tuple[int, ...], int], ...]

    def problem(self, library: ctypes.CDLL) -> str:
        """What was not as it should be; empty where all was."""
        experts = len(self.calls[0][0])
        store = Store(library, experts, self.slots, self.policy, self.late)
        visits = 0
        try:
            for rows, launches in self.calls:
                store.call(rows, launches)
                needed = [e for e, count in enumerate(rows) if count]
                visits += len(needed)
                if launches < 1 << 30:
                    continue
                store.streams.drain(KERNELS)
                for p in range(PRODUCTS):
                    if Counter(store.multiplied[p]) != Counter(100 * p + e + 1 for e in needed):
                        return f"{needed} of product {p}: {store.multiplied[p]}"
            calls, counted, hits, size, *_ = store.counts()
            if (calls, counted) != (len(self.calls), visits):
                return f"{calls} calls and {counted} visits"
            ended = all(launches == 1 << 30 for _, launches in self.calls)
            if ended and size != 8 * PRODUCTS * (visits - hits):
                return f"{size} bytes for {visits - hits} experts"
            return ""
        finally:
            store.close()


def _cases(given_up: bool) -> st.SearchStrategy[Case]:
    def of(experts: int) -> st.SearchStrategy[Case]:
        one = st.integers(0, experts - 1).map(lambda e: tuple(3 * (e == i) for i in range(experts)))
        rows = one | st.tuples(*[st.integers(0, 2)] * experts) | st.just((1,) * experts)
        launches = st.just(1 << 30) | st.integers(0, 5) if given_up else st.just(1 << 30)
        calls = st.lists(st.tuples(rows, launches), min_size=1, max_size=6).map(tuple)
        late = st.sampled_from([None, KERNELS, COPIES])
        return st.builds(Case, st.integers(1, experts), st.sampled_from(POLICIES), late, calls)

    return st.integers(1, 7).flatmap(of)


@given(case=_cases(given_up=False))
def test_every_launch_finds_its_experts(library: ctypes.CDLL, case: Case) -> None:
    assert not case.problem(library)


@given(case=_cases(given_up=True))
def test_a_call_may_be_given_up(library: ctypes.CDLL, case: Case) -> None:
    """Between two launches, as where memory runs out: later calls are right."""
    assert not case.problem(library)


def test_what_is_in_slots_is_not_copied_again(library: ctypes.CDLL) -> None:
    store = Store(library, 4, 2, "lfu", None)
    for rows in ((1, 1, 0, 0), (1, 1, 0, 0), (0, 1, 1, 0)):
        store.call(rows)
    assert store.counts()[:4] == [3, 6, 3, 8 * PRODUCTS * 3]
    store.close()


def test_copies_run_under_products(library: ctypes.CDLL) -> None:
    """What is in slots is multiplied before the copies of the others are waited for."""
    store = Store(library, 4, 4, "lfu", COPIES)
    store.call((1, 1, 0, 0))
    copied, launches, launch = store.streams.done[COPIES], [], store.launch

    def watched(p: int, wave: int, products: list[list[int]]) -> None:
        launches.append((p, wave, store.streams.done[COPIES] > copied))
        launch(p, wave, products)

    store.launch = watched  # type: ignore[method-assign]
    store.call((1, 1, 1, 0))
    assert launches[:2] == [(0, 0, False), (0, 1, True)]
    store.close()


BUGS = {
    "a launch does not wait for copies": (
        "return checked(d, d->options.cuda.wait(kernel_stream(d), filled, 0));",
        "return 0;",
    ),
    "a copy does not wait for the launch before": (
        "error = c->wait(stream, d->options.read, 0), waits = 0;",
        "waits = 0;",
    ),
    "copies begin when their slots are in use": (
        "layer->due[i] = i < layer->hits ? -1 : wave;",
        "layer->due[i] = -1;",
    ),
    "the routing is read before it is there": (
        "error = error ? error : c->synchronize(stream);",
        "",
    ),
    "the table is off by one": (
        "layer->table[visit->expert] = visit->slot,",
        "layer->table[visit->expert] = (visit->slot + 1) % of->shape.slots,",
    ),
    "an expert is copied into the slot of another": (
        "a->slots + of->visit[i].slot * a->bytes",
        "a->slots + of->visit[layer->first[wave]].slot * a->bytes",
    ),
    "slots are trusted after a call that was given up": ("if (layer->open)", "if (0)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_found(bug: str, tmp_path: Path) -> None:
    library, rng = _built(tmp_path, *BUGS[bug]), np.random.default_rng(0)
    for _ in range(60):
        calls = tuple(
            (tuple(map(int, rng.integers(0, 2, 6))), int(rng.choice([1, 2, 1 << 30, 1 << 30])))
            for _ in range(5)
        )
        late = (None, KERNELS, COPIES)[rng.integers(3)]
        if Case(int(rng.integers(1, 6)), "lfu", late, calls).problem(library):
            return
    pytest.fail("no case shows it")
