"""Experts that are read as narrow copies: exact without a budget, and never beyond it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moec
from moec.errors import ArtifactError, UsageError
from moec.model.rebuild import rebuild
from moec.runtime.artifact.artifact import Artifact, read
from moec.runtime.artifact.container import part_spans
from moec.runtime.call.executor import Executor, start
from moec.runtime.device.library import tvm_ffi
from moec.runtime.expert_store import device
from moec.runtime.expert_store.device import BUFFERED, DIRECT, StoringCpu
from moec.runtime.expert_store.native import ALTERED, FailedRead, StoreCounts, StoreOptions
from moec.runtime.expert_store.start import start_with_slots, start_within, store_report
from tests.once import Once
from tests.runtime.expert_store.models import artifact, widened

EXPERTS, WIDTH, HIDDEN, K = 8, 64, 84, 3
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
X = np.random.default_rng(1).standard_normal((6, WIDTH)).astype(np.float32)


def shuffled(*shape: int) -> torch.Tensor:
    """Weights of experts, of which no two of one are equal."""
    values = torch.linspace(-0.3, 0.3, shape[0] * shape[1])
    each = [values[torch.randperm(len(values))].reshape(shape) for _ in range(EXPERTS)]
    return torch.stack(each)


class Layer(torch.nn.Module):
    """Experts of two products; the elements of the second are no whole blocks of a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = torch.nn.Parameter(shuffled(HIDDEN, WIDTH))
        self.down = torch.nn.Parameter(shuffled(WIDTH, HIDDEN))

    def routing(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(self.router(x).softmax(-1), K)
        return weights, ids

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.routing(x)
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[ids]).relu()
        rows = torch.einsum("tkh,tkdh->tkd", hidden, self.down[ids])
        return (rows * weights[..., None]).sum(1)


class Unweighted(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, ids = self.routing(x)
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[ids]).relu()
        return torch.einsum("tkh,tkdh->tkd", hidden, self.down[ids]).sum(1)


def layer(dtype: str = "f32") -> Layer:
    torch.manual_seed(0)
    return Layer().to(DTYPES[dtype]).eval()


def stored(once: Once, dtype: str) -> Path:
    def write(folder: Path) -> None:
        example = torch.randn(6, WIDTH, dtype=DTYPES[dtype])
        moec.compile(layer(dtype), (example,), tiers=True, verify=False).save(folder / "layer.moec")

    return once(f"tiers-{dtype}", write) / "layer.moec"


@pytest.fixture
def path(once, tmp_path) -> Path:
    return Path(shutil.copy(stored(once, "f32"), tmp_path / "layer.moec"))


def in_slots(path: Path, narrow: float, slots: int = 1, reading: str = DIRECT) -> Executor:
    return start_with_slots(read(path), [slots], reading, StoreOptions(narrow=narrow))


def output(model: Executor, x: np.ndarray = X) -> np.ndarray:
    (port,) = model.package.main.inputs
    dtype = (
        ml_dtypes.bfloat16 if port.dtype == "bf16" else np.dtype(port.dtype.replace("f", "float"))
    )
    (result,) = model({port.name: x.astype(dtype)}).values()
    return np.array(result)


def counts(model: Executor) -> StoreCounts:
    report = store_report(model)
    assert report is not None
    return report.counts


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end


def narrowed(opened: Artifact, experts: Iterable[int]) -> dict[str, np.ndarray]:
    """The packed arrays of a model in which the weights of these experts are the widened ones."""
    assert opened.package.store is not None
    arrays = {}
    for stack in (stack for layer in opened.package.store.layers for stack in layer):
        array = np.array(opened.package.arrays[stack.arrays[0]])
        dtype = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}[stack.narrow]
        flat = array.reshape(EXPERTS, -1).view(dtype)
        wide = widened(np.asarray(opened.package.arrays[stack.narrow_array]), flat.shape[1])
        for expert in experts:
            flat[expert] = wide[expert]
        arrays[stack.arrays[0]] = array
    return arrays


def with_arrays(opened: Artifact, arrays: dict[str, np.ndarray]) -> Executor:
    """The model in memory, with some other weights."""
    package = opened.package
    held = {name: np.asarray(package.arrays[name]) for name in package.params}
    return start(replace(opened, package=replace(package, arrays={**held, **arrays})))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_budget_copies_change_no_bit(once, dtype):
    path = stored(once, dtype)
    right = output(start(read(path)))
    for slots in (1, 3, EXPERTS):
        model = in_slots(path, 0, slots)
        assert [output(model).tobytes() for _ in range(3)] == [right.tobytes()] * 3
        assert counts(model).narrow_reads == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reading", [DIRECT, BUFFERED])
def test_narrow_experts_have_the_widened_weights(once, dtype, reading):
    path = stored(once, dtype)
    opened = read(path)
    right = output(with_arrays(opened, narrowed(opened, range(EXPERTS))))
    assert right.tobytes() != output(start(read(path))).tobytes()
    model = in_slots(path, 1, reading=reading)
    for _ in range(3):
        assert output(model).tobytes() == right.tobytes()
    total = counts(model)
    assert total.bytes_read == total.narrow_bytes
    assert total.narrow_weight == pytest.approx(total.weight)


def least_first(x: np.ndarray, budget: float) -> list[int]:
    """The experts that eager's routing gives the least weight, as far as the budget allows."""
    weights, ids = layer().routing(torch.from_numpy(x))
    sums = torch.zeros(EXPERTS).index_add(0, ids.flatten(), weights.detach().flatten()).tolist()
    used = sorted((sums[e], e) for e in set(ids.flatten().tolist()))
    chosen, left = [], budget * sum(sums)
    for weight, expert in used:
        if weight > left:
            break
        chosen.append(expert)
        left -= weight
    return chosen


def eager_with(opened: Artifact, experts: list[int]) -> np.ndarray:
    """PyTorch's output with the widened weights of these experts. The packed arrays of f32 are a
    permutation of the weights, which are all different."""
    module = layer()
    with torch.no_grad():
        for (name, near), weight in zip(
            narrowed(opened, experts).items(), (module.up, module.down), strict=True
        ):
            exact = np.asarray(opened.package.arrays[name]).reshape(EXPERTS, -1)
            for expert in experts:
                order = np.argsort(exact[expert], kind="stable")
                values = weight[expert].numpy().reshape(-1)
                at = np.searchsorted(exact[expert][order], values)
                assert (exact[expert][order][at] == values).all()
                new = near.reshape(EXPERTS, -1)[expert][order][at]
                weight[expert] = torch.from_numpy(new.reshape(weight[expert].shape))
        return module(torch.from_numpy(X)).numpy()


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6])
def test_the_least_weighted_are_narrow_as_eager_says(once, budget):
    path = stored(once, "f32")
    opened, experts = read(path), least_first(X, budget)
    assert 0 < len(experts) < EXPERTS
    expected = eager_with(opened, experts)
    model = in_slots(path, budget, EXPERTS)
    np.testing.assert_allclose(output(model), expected, atol=1e-5)
    assert np.abs(eager_with(opened, []) - expected).max() > 1e-3
    planted = output(with_arrays(opened, narrowed(opened, experts)))
    again = in_slots(path, budget, EXPERTS)
    assert output(again).tobytes() == planted.tobytes()
    assert counts(again).narrow_reads == 2 * len(experts)


def test_several_threads(path):
    opened = read(path)
    right = output(with_arrays(opened, narrowed(opened, range(EXPERTS)))).tobytes()
    models, wrong = [in_slots(path, 1, slots) for slots in (1, 3)], []

    def call(model: Executor) -> None:
        wrong.extend(n for n in range(5) if output(model).tobytes() != right)

    threads = [threading.Thread(target=call, args=(models[n % 2],)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


Plan = Callable[..., None]


@pytest.fixture
def plan(monkeypatch) -> Plan:
    """Plans a call of the model in slots that is opened next; with `wait` until an expert has been
    read in full, by both products."""
    getters, native_store = [], device.NativeStore

    def watched(get_function: Any, *arguments: Any) -> Any:
        getters.append(get_function)
        return native_store(get_function, *arguments)

    monkeypatch.setattr(device, "NativeStore", watched)

    def call(model: Executor, ids: np.ndarray, weights: np.ndarray, *, wait: bool = False) -> None:
        assert isinstance(model.device, StoringCpu)
        key = model.device.in_memory[model.device._layers[0][0].key]
        flat = ids[(ids >= 0) & (ids < EXPERTS)]
        ends = np.bincount(flat, minlength=EXPERTS).cumsum().astype(np.int32)
        order, before = np.zeros(EXPERTS + 1, np.int32), counts(model).bytes_read
        arguments = map(
            tvm_ffi().from_dlpack, (key, ends, np.zeros(1), ids, weights.astype(np.float32), order)
        )
        getters[-1]("moec_store_plan")(*arguments)
        report = store_report(model)
        assert report is not None
        size = report.expert_bytes // EXPERTS
        until(lambda: not wait or counts(model).bytes_read >= before + size)

    return call


def slot_of(model: Executor) -> bytes:
    """The content of the first slot of the first product."""
    assert isinstance(model.device, StoringCpu)
    array = model.device.in_memory[model.device._layers[0][0].arrays[0]]
    return array[0].tobytes()


def test_a_narrow_expert_is_read_again_where_it_weighs_more(path, plan):
    """By the time a kernel may read the slot, it has the weights; and it stays as it is where the
    budget allows."""
    opened, model = read(path), in_slots(path, 0.25)
    name = opened.package.store.layers[0][0].arrays[0]
    exact = np.asarray(opened.package.arrays[name])[5].tobytes()
    near = narrowed(opened, [5])[name][5].tobytes()

    plan(model, np.array([[5, 6]]), np.array([[0.2, 0.8]]))
    until(lambda: counts(model).narrow_reads == 2 and slot_of(model) == near)
    plan(model, np.array([[5, 5]]), np.array([[0.01, 0.0]]))
    plan(model, np.array([[5, 5]]), np.array([[0.9, 0.1]]), wait=True)
    until(lambda: slot_of(model) == exact)
    assert counts(model).narrow_reads == 2


ROUTING = st.lists(
    st.tuples(
        st.lists(st.integers(-1, EXPERTS), min_size=K, max_size=K),
        st.lists(st.floats(0, 1, width=32), min_size=K, max_size=K),
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(ROUTING, min_size=1, max_size=12), st.floats(0.01, 1), st.integers(1, EXPERTS))
def test_the_budget_is_never_exceeded(path, plan, routings, budget, slots):
    model = in_slots(path, budget, slots)
    for routing in routings:
        ids, weights = (np.array(part) for part in zip(*routing, strict=True))
        plan(model, ids, weights)
        total = counts(model)
        inside = (ids >= 0) & (ids < EXPERTS)
        assert total.narrow_weight <= budget * total.weight * (1 + 1e-9) + 1e-9
        assert total.weight >= weights[inside].sum() * (1 - 1e-6)


def test_weights_that_are_no_numbers_are_exact(path, plan):
    model = in_slots(path, 1, EXPERTS)
    for weight in (np.nan, np.inf):
        plan(model, np.array([[1, 2]]), np.array([[weight, 0.1]]))
    total = counts(model)
    assert (total.narrow_reads, total.weight) == (0, 0)


def damage(path: Path) -> None:
    """Alters the last byte of each narrow copy of the second product."""
    opened, content = read(path), path.read_bytes()
    spans = part_spans(path, lambda start, size: content[start : start + size])
    name = opened.package.store.layers[0][1].narrow_array
    span = spans[opened.manifest.arrays[name].part]
    with path.open("r+b") as file:
        for expert in range(EXPERTS):
            file.seek(span.start + (expert + 1) * (span.stop - span.start) // EXPERTS - 1)
            file.write(b"\x55")


def test_a_copy_is_hashed_although_the_weights_were(path, plan):
    damage(path)
    model = in_slots(path, 1)
    for expert in (1, 2):
        plan(model, np.array([[expert]]), np.array([[np.nan]]), wait=True)
    plan(model, np.array([[1]]), np.array([[1.0]]))
    assert isinstance(model.device, StoringCpu)
    store, failures = model.device.store, list[FailedRead]()
    until(lambda: failures.extend(filter(None, [store.failed_read()])) or failures)
    (failed,) = failures
    assert (failed.stack, failed.expert, failed.error) == (1, 1, ALTERED)


def test_a_damaged_copy_is_refused_when_it_is_read(path):
    right = output(start(read(path)))
    damage(path)
    assert output(in_slots(path, 0)).tobytes() == right.tobytes()
    with pytest.raises(ArtifactError, match=r"expert . of .* was altered: its SHA-256 differs"):
        output(in_slots(path, 1))


def test_code_that_is_generated_again_reads_copies_too(path):
    opened = read(path, native=False)
    again = replace(opened, package=rebuild(opened))
    model = start_with_slots(again, [1], DIRECT, StoreOptions(narrow=1))
    output(model)
    total = counts(model)
    assert 0 < total.narrow_bytes == total.bytes_read


def test_refusals(once, path):
    plain = artifact(once, None)
    words = "has no narrow copies of its experts: compile it with tiers=True"
    with pytest.raises(UsageError, match=words):
        moec.load(plain, memory="1GiB", narrow=0.1)
    with pytest.raises(UsageError, match="narrow is for experts that memory leaves in the file"):
        moec.load(path, narrow=0.1)
    with pytest.raises(UsageError, match=r"narrow is 1\.5: give the share of the routing weight"):
        start_within(read(path), 1 << 30, narrow=1.5)
    x = (torch.randn(6, WIDTH),)
    with pytest.raises(UsageError, match="--tiers stores copies of experts for --store"):
        moec.compile(layer(), x, tiers=True, store=False)
    with pytest.raises(UsageError, match="--tiers copies weights of 16 or 32 bits, and those of"):
        moec.compile(layer(), x, tiers=True, quant="int8", verify=False)
    with pytest.raises(UsageError, match=r"--tiers needs routing weights, and .* has none"):
        moec.compile(Unweighted(), x, tiers=True, verify=False)
    with pytest.raises(UsageError, match="--tiers needs experts that can stay on disk"):
        moec.compile(torch.nn.Linear(WIDTH, 8), x, tiers=True, verify=False)
