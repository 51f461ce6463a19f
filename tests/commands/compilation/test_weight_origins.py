"""Weights in memory are recognised as tensors of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moec.commands.compilation import weight_origins
from moec.commands.compilation.weight_origins import Origins, origins_of
from moec.runtime.arrays.strided_copy import copied
from moec.runtime.dtypes import Array


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def bytes_of(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


class Stored:
    """Files of tensors, and what of some memory comes from them."""

    def __init__(self, folder: Path, *tensors: Mapping[str, Array]) -> None:
        paths = [folder / f"{number}.safetensors" for number in range(len(tensors))]
        for path, content in zip(paths, tensors, strict=True):
            save_file(dict(content), path)
        self.files = [(path, memoryview(path.read_bytes())) for path in paths]

    def origins(self, *memories: Array) -> Origins:
        return origins_of(self.files, [bytes_of(memory) for memory in memories])

    def copy(self, origins: Origins, target: Array, source: Array) -> Array | None:
        """`target` after the copy of `source`, from the files."""
        copies = origins.copies(target.ctypes.data, [(target, source)])
        if copies is None:
            return None
        content = copied(target.nbytes, copies, [content for _, content in self.files])
        return np.frombuffer(content, target.dtype).reshape(target.shape)


def test_a_transposed_view_of_a_tensor(tmp_path: Path) -> None:
    weight = numbers(6, 40)
    stored = Stored(tmp_path, {"a": numbers(50, seed=1)}, {"b": numbers(50, seed=2), "w": weight})
    view = weight[1:, 3:33:2].T
    origins = stored.origins(weight)
    assert np.array_equal(stored.copy(origins, np.zeros((15, 5), "f4"), view), view)
    repeated = np.broadcast_to(weight[:, :1], (6, 40))
    assert np.array_equal(stored.copy(origins, np.zeros((6, 40), "f4"), repeated), repeated)
    assert stored.copy(stored.origins(), np.zeros((6, 40), "f4"), repeated) is None


def test_a_stack_of_matrices_from_several_files(tmp_path: Path) -> None:
    """As models with a matrix per expert and projection are stored, and as they are computed."""
    experts, rows = 5, 8
    gates = [numbers(rows, 16, seed=e) for e in range(experts)]
    ups = [numbers(rows, 16, seed=100 + e) for e in range(experts)]
    stored = Stored(
        tmp_path,
        {f"{e}.gate": gates[e] for e in range(experts)},
        {f"{e}.up": ups[e] for e in range(experts)},
    )
    stack = np.stack([np.concatenate(pair) for pair in zip(gates, ups, strict=True)])
    origins = stored.origins(stack)
    assert len(origins.pieces) == 2 * experts
    for half in (stack[:, :rows], stack[:, rows:], stack.transpose(2, 1, 0)):
        turned = half.transpose(0, 2, 1)
        assert np.array_equal(stored.copy(origins, np.zeros(turned.shape, "f4"), turned), turned)
    copies = origins.copies(0, [(np.zeros((experts, rows, 16), "f4"), stack[:, :rows])])
    assert copies is not None
    assert len(copies) == experts


def test_equal_tensors_of_several_sizes(tmp_path: Path) -> None:
    stored = Stored(tmp_path, {"a": np.ones(20, "f4"), "b": np.ones(64, "f4")})
    memory = np.ones(84, "f4")
    assert [p.tensor.size for p in stored.origins(memory).pieces] == [64 * 4, 20 * 4]


def test_what_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(6, 40)
    stored = Stored(tmp_path, {"w": weight})
    computed = weight * 2
    target = np.zeros((6, 40), "f4")
    assert stored.copy(stored.origins(computed), target, computed) is None
    both = np.concatenate([weight, computed])
    assert np.array_equal(stored.copy(stored.origins(both), target, both[:6]), weight)
    assert stored.copy(stored.origins(both), target, both[3:9]) is None
    assert stored.copy(stored.origins(weight), target, weight[::-1]) is None
    changed = weight.copy()
    changed[3, 3] += 1
    assert stored.origins(changed).pieces == ()
    monkeypatch.setattr(weight_origins, "MOST_COPIES", 3)
    stack = np.stack([weight] * 4)
    assert stored.copy(stored.origins(stack), np.zeros((4, 6, 40), "f4"), stack) is None


def test_large_tensors_are_compared_at_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_origins, "SAMPLE_BYTES", 16)
    weight = numbers(40, 40)
    stored = Stored(tmp_path, {"w": weight})
    assert len(stored.origins(weight).pieces) == 1
    changed = weight.copy()
    changed[-1, -1] += 1
    assert stored.origins(changed).pieces == ()
