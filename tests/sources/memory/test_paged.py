"""Paged weights are read when an operator needs them, at most `limit` bytes of them at once."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moec.errors import MoecError
from moec.sources.memory import ranges
from moec.sources.memory.paged import PagedWeights, ReadsWeights, UnreadableWeight
from moec.sources.memory.spool import Spool

SIZE = 1 << 16


class Counted:
    """Writes one value, and counts how often."""

    def __init__(self, value: float) -> None:
        self.value, self.count = value, 0

    def __call__(self, tensor: Tensor) -> None:
        self.count += 1
        tensor.fill_(self.value)


@pytest.fixture
def weights():
    return PagedWeights(2 * SIZE, Spool())


def add(weights: PagedWeights, value: float, dtype: torch.dtype = torch.float32):
    read = Counted(value)
    return weights.add(torch.Size((SIZE // 4 // 64, 64)), dtype, read), read


@pytest.fixture
def readable(monkeypatch):
    """Absent weights as they are outside of tests."""
    monkeypatch.setattr(ranges, "ABSENT_ACCESS", mmap.PROT_READ)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_operator_reads_what_it_needs(weights, mode):
    first, read = add(weights, 2.0)
    _, other = add(weights, 3.0)
    parameter = torch.nn.Parameter(first)
    with ReadsWeights(weights), mode():
        assert (parameter.t()[5:] + 0).eq(2).all()  # a view is filled with its weight
        assert parameter.double().eq(2).all()
        assert torch.nn.functional.linear(torch.ones(1, 64), parameter).eq(128).all()
    assert (read.count, other.count) == (1, 0)


def test_the_least_recently_used_weights_make_room(weights):
    pairs = [add(weights, float(n)) for n in range(3)]
    tensors = [tensor for tensor, _ in pairs]
    with ReadsWeights(weights):
        for number in (0, 1, 0, 2, 0, 1):
            assert tensors[number].sum() == number * SIZE / 4
        assert (tensors[0] + tensors[1] + tensors[2]).eq(3).all()  # more than the limit in one go
    assert [read.count for _, read in pairs] == [1, 2, 2]


def test_a_weight_that_was_not_read_is_nan(readable):
    """So that a mistake cannot give a plausible number."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weights = PagedWeights(2 * SIZE, Spool())
        tensor, read = add(weights, 1.0, dtype)
        assert tensor.isnan().all()
        with ReadsWeights(weights):
            assert tensor.eq(1).all()
        weights.drop()
        assert tensor.isnan().all()
        assert read.count == 1


def test_reading_an_absent_weight_ends_a_run_of_tests():
    """For integers no value says that they were not read."""
    script = (
        "from moec.sources.memory import ranges; ranges.ABSENT_ACCESS = 0;"
        "range = ranges.AddressRange(5000); range.provide(); print(range.buffer()[4999]);"
        "range.drop(); print(range.buffer()[4999])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "b'\\x00'\n")


def test_writing_to_a_weight_is_refused(weights):
    tensor, _ = add(weights, 1.0)
    with ReadsWeights(weights), pytest.raises(MoecError) as raised:
        tensor.mul_(2)
    assert str(raised.value) == "the model writes to one of its weights (aten.mul_.Tensor)"
    one = torch.ones(tensor.shape)
    with ReadsWeights(weights), pytest.raises(MoecError, match="writes to one of its weights"):
        torch.add(one, one, out=tensor)
    with ReadsWeights(weights):
        assert one.mul_(tensor).eq(1).all()  # it is read there, and not written to


def test_alike_weights_have_the_values_of_the_first(weights):
    pairs = [add(weights, float(n)) for n in (1, 2, 3)]
    other = weights.add(torch.Size((8, SIZE)), torch.bfloat16, Counted(7.0))
    with ReadsWeights(weights):
        with weights.share_values():
            for tensor, _ in pairs:
                assert tensor.eq(1).all()
            assert other.eq(7).all()
        for number, (tensor, _) in enumerate(pairs, 1):
            assert tensor.eq(number).all()
    assert [read.count for _, read in pairs] == [2, 1, 1]


def test_a_reader_runs_outside_of_the_modes_of_the_operator(weights):
    """What a mode counts, changes or refuses is the model's, not how its weights are read."""
    from moec.ir.interpret.run_in_float32 import InFloat32

    dtypes = []

    def read(tensor: Tensor) -> None:
        tensor.copy_(torch.ones(4, dtype=torch.bfloat16) * 2)
        dtypes.append((torch.ones(1, dtype=torch.bfloat16) + 1).dtype)

    tensor = weights.add(torch.Size((4,)), torch.bfloat16, read)
    with ReadsWeights(weights), InFloat32():
        total = tensor + tensor
    assert total.dtype == torch.float32
    assert total.eq(4).all()
    assert dtypes == [torch.bfloat16]


def test_an_error_of_a_reader_is_the_operators(readable, weights):
    def read(tensor: Tensor) -> None:
        raise MoecError("the file was cut")

    tensor = weights.add(torch.Size((4,)), torch.float32, read)
    with ReadsWeights(weights), pytest.raises(UnreadableWeight, match="the file was cut"):
        tensor.sum()
    assert "the file was cut" in str(weights.failure)
    assert tensor.isnan().all()


def test_a_cast_weight_is_read_again(weights):
    tensor, read = add(weights, 1.5)
    cast = weights.cast(tensor, torch.bfloat16)
    with ReadsWeights(weights):
        assert cast.eq(1.5).all()
    assert cast.dtype == torch.bfloat16
    assert read.count == 1
