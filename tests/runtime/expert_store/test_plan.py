"""`moec plan --memory`: what is expected, beside what the store does."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moec.runtime.artifact.artifact import read
from moec.runtime.artifact.open_file import OpenFile
from moec.runtime.call.routing_trace import RoutingTrace, save_trace
from moec.runtime.expert_store import read_speed as read_speed_module
from moec.runtime.expert_store.device import BUFFERED, DIRECT
from moec.runtime.expert_store.read_speed import read_speed
from moec.runtime.expert_store.start import ONE_TEXT, resident_limit, stored_sizes
from tests.command_line import invoke
from tests.once import Once
from tests.runtime.expert_store.models import EXPERTS, LAYERS, artifact


@pytest.fixture(scope="module")
def path(once: Once) -> Path:
    return artifact(once, None)


plan = partial(invoke, "plan")


def limit_for(path: Path, slots: int) -> str:
    """The limit with which each layer has at least so many slots, as this process grows a bit."""
    opened = read(path)
    least = -resident_limit(opened, 0, ONE_TEXT).experts
    slot_bytes = sum(slots * layer.expert_bytes for layer in stored_sizes(opened))
    return f"{(least + slot_bytes >> 20) + 256}MiB"


def test_rows_of_limits(path):
    result = plan(path, "--memory", f"{limit_for(path, EXPERTS)},64GiB", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["speeds"]["measured"]
    assert answer["speeds"]["disk"] > 1e6
    assert answer["speeds"]["token"] > 0
    for row in answer["limits"]:
        assert row["slots"] == [EXPERTS] * LAYERS
        assert (row["hits"], row["read"]) == (1.0, 0.0)
        assert row["seconds"] == answer["speeds"]["token"]


def test_as_text_with_a_trace(path, tmp_path):
    ids = np.random.default_rng(0).integers(EXPERTS, size=(40, LAYERS, 2)).astype(np.int16)
    numbers = np.arange(40, dtype=np.int32)
    experts = np.full(LAYERS, EXPERTS, np.int32)
    trace = RoutingTrace(ids, numbers, np.ones(40, np.uint8), numbers * 0, experts)
    save_trace(trace, tmp_path / "t.npz")
    result = plan(path, "--memory", "64GiB", "--trace", tmp_path / "t.npz")
    assert result.exit_code == 0, result.stderr
    first, header, row = result.stdout.splitlines()
    assert f"routing of {tmp_path / 't.npz'}" in first
    assert (
        header.split() == "memory slots a layer policy hits read a token a token tokens/s".split()
    )
    assert row.startswith("68.7 GB  8")
    assert "100%" in row


def test_refusals(path, tmp_path):
    for code, words, message in (
        (1, (tmp_path, "--memory", "1GiB"), f"{tmp_path} is not a moec artifact"),
        (2, (path, "--memory", "1GiB,x"), "'x': give bytes, or a size with GiB"),
        (1, (path, "--memory", "1MiB"), "and this model needs"),
        (2, (path, "--memory", "1GiB", "-o", tmp_path / "plan.json"), "-o is for a cluster, and"),
    ):
        result = plan(*words)
        assert result.exit_code == code
        assert message in result.stderr


@pytest.mark.parametrize("reading", [DIRECT, BUFFERED])
@pytest.mark.parametrize("size", [1, 5000, 300_000])
def test_the_speed_of_small_files(tmp_path, reading, size):
    (tmp_path / "file").write_bytes(bytes(size))
    assert read_speed(OpenFile(tmp_path / "file"), reading, 1 << 20) > 0


def test_the_page_cache_is_measured_where_it_is_warm(tmp_path, monkeypatch):
    """What the first reading does not reach in its second would be cold in the next one."""
    (tmp_path / "file").write_bytes(bytes(64 << 16))
    cached: set[int] = set()
    seconds = 0.0

    def preadv(descriptor, buffers, offset):
        nonlocal seconds
        seconds += 0.01 if offset in cached else 0.1
        cached.add(offset)
        return 1 << 16

    monkeypatch.setattr(read_speed_module.os, "preadv", preadv)
    monkeypatch.setattr(read_speed_module.time, "perf_counter", lambda: seconds)
    speed = read_speed(OpenFile(tmp_path / "file"), BUFFERED, 1 << 16)
    assert speed == pytest.approx((1 << 16) / 0.01)
