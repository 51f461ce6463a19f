"""Experts are read early where the next layer is expected to choose them; no bit depends on it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.errors import ArtifactError
from moec.runtime.artifact.artifact import read
from moec.runtime.artifact.container import part_spans
from moec.runtime.call.executor import Executor, start
from moec.runtime.device.library import tvm_ffi
from moec.runtime.expert_store import device
from moec.runtime.expert_store.device import DIRECT, StoringCpu
from moec.runtime.expert_store.native import StoreCounts, StoreOptions
from moec.runtime.expert_store.start import start_with_slots, store_report
from moec.runtime.text.texts import Texts
from tests.runtime.expert_store.models import EXPERTS, LAYERS, artifact

TOKENS = np.random.default_rng(3).integers(100, size=(2, 24)).tolist()


@pytest.fixture
def path(once, tmp_path) -> Path:
    return Path(shutil.copy(artifact(once, None), tmp_path / "model.moec"))


def in_slots(path: Path, slots: int, predict: str) -> Executor:
    options = StoreOptions(readers=2, predict=predict)
    return start_with_slots(read(path), [slots] * LAYERS, DIRECT, options)


def logits(executor: Executor, texts: int = 1) -> list[bytes]:
    """After a prompt of 8 tokens, then token by token."""
    state = Texts(executor, texts, len(TOKENS[0]))
    spans = [slice(0, 8), *(slice(n, n + 1) for n in range(8, len(TOKENS[0])))]
    return [state.feed([ids[span] for ids in TOKENS[:texts]]).tobytes() for span in spans]


@pytest.mark.parametrize("texts", [1, 2])
def test_the_bits_do_not_depend_on_guesses(path, texts):
    right = logits(start(read(path)), texts)
    for slots in (1, 2, 3, 5, EXPERTS):
        for predict in ("never", "always", "measured"):
            model = in_slots(path, slots, predict)
            assert logits(model, texts) == right
            assert logits(model, texts) == right


def counts(model: Executor) -> StoreCounts:
    report = store_report(model)
    assert report is not None
    return report.counts


def test_guesses_are_counted(path):
    never, always = in_slots(path, 4, "never"), in_slots(path, 4, "always")
    for model in (never, always):
        logits(model)
    without, with_guesses = counts(never), counts(always)
    assert (without.guesses, without.right, without.early, without.vain) == (0, 0, 0, 0)
    assert without.visits == with_guesses.visits
    # the second layer has two stacks, and computes one token a step, also of the prompt
    assert with_guesses.guesses == 2 * 2 * (1 + len(TOKENS[0]) - 8)
    assert 0 < with_guesses.right <= with_guesses.guesses
    assert 0 <= with_guesses.early <= with_guesses.right
    assert with_guesses.vain < with_guesses.bytes_read


def test_what_is_in_slots_is_not_read_early(path):
    model = in_slots(path, EXPERTS, "always")
    for _ in range(6):
        logits(model)
    first = counts(model)
    logits(model)
    assert counts(model).bytes_read == first.bytes_read


def alter(path: Path, layer: int) -> None:
    opened, content = read(path), path.read_bytes()
    spans = part_spans(path, lambda start, size: content[start : start + size])
    assert opened.package.store is not None
    with path.open("r+b") as file:
        for stack in opened.package.store.layers[layer]:
            for name in stack.arrays:
                span = spans[opened.manifest.arrays[name].part]
                file.seek(span.start)
                file.write(b"\x55" * (span.stop - span.start))


def test_a_guess_that_is_altered_ends_the_call(path):
    alter(path, 1)
    model = in_slots(path, 4, "always")
    state = Texts(model, 1, 4)
    with pytest.raises(ArtifactError, match=r"expert . of model\.layers\.1\.mlp\.experts was alt"):
        state.feed([[1]])


@pytest.fixture
def plan(monkeypatch):
    """Plans a call of a layer of the model in slots that is opened next, with a guess."""
    getters, native_store = [], device.NativeStore

    def watched(get_function: Any, *arguments: Any) -> Any:
        getters.append(get_function)
        return native_store(get_function, *arguments)

    monkeypatch.setattr(device, "NativeStore", watched)

    def call(model: Executor, layer: int, experts: list[int], *guesses: np.ndarray) -> None:
        assert isinstance(model.device, StoringCpu)
        key = model.device.in_memory[model.device._layers[layer][0].key]
        ends = np.bincount(experts, minlength=EXPERTS).cumsum().astype(np.int32)
        rows, order = np.zeros(1), np.zeros(EXPERTS + 1, np.int32)
        arguments = map(tvm_ffi().from_dlpack, (key, ends, rows, *guesses, order))
        getters[0]("moec_store_plan")(*arguments)

    return call


def test_guesses_outside_of_the_experts_are_left_out(path, plan):
    model = in_slots(path, 4, "always")
    plan(model, 0, [0], np.array([[-1, EXPERTS], [2**40 + 5, -(2**62)], [5, 5]]))
    plan(model, 1, [0])
    total = counts(model)
    assert (total.guesses, total.right) == (2, 0)


@pytest.mark.parametrize("altered", [False, True])
def test_a_guess_is_hashed_as_what_is_needed_is(path, plan, altered):
    if altered:
        alter(path, 1)
    model = in_slots(path, 4, "always")
    report = store_report(model)
    assert report is not None
    plan(model, 0, [], np.array([[5, 6]]))
    end = time.monotonic() + 60
    while counts(model).bytes_read < 2 * report.expert_bytes // (LAYERS * EXPERTS):
        assert time.monotonic() < end
    plan(model, 1, [5, 6])
    total = counts(model)
    assert total.hits == total.early == (0 if altered else 4)
    assert total.vain == 0


def test_a_trial_times_steps_with_guesses_and_without(path):
    """64 steps pass without guesses, then 128 in turns; the rest is as the times say."""
    model, steps = in_slots(path, EXPERTS, "measured"), 0
    totals = []
    while steps < 64 + 128:
        state = Texts(model, 1, 48)
        for token in np.resize(TOKENS[0], 48).tolist():
            state.feed([[token]])
            steps += 1
            totals.append(counts(model).guesses)
    assert totals[63] == totals[71] == 0
    assert totals[79] == totals[87] == 8 * 2 * 2
    assert totals[-1] == 64 * 2 * 2
