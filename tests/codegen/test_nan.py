"""NaN that a checkpoint has not is never stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moec
from moec.codegen import package
from moec.errors import VerificationError
from moec.runtime.call.executor import Executor


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


X = torch.randn(3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [0, -1])
def test_a_weight_with_nan_where_the_model_has_none(dtype, number, monkeypatch):
    packed = package.packed_arrays

    def broken(*args):
        arrays = packed(*args)
        name = list(arrays)[number]
        arrays[name] = arrays[name].copy()
        arrays[name].reshape(-1)[-1:].view("u1")[:] = 255
        return arrays

    monkeypatch.setattr(package, "packed_arrays", broken)
    with pytest.raises(VerificationError, match="is stored with other bits than"):
        moec.compile(linear().to(dtype), (X.to(dtype),), verify=False)


def test_a_model_with_nan_is_saved_without_a_sample(tmp_path):
    model = linear()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    model.register_buffer("mask", torch.full((4,), -torch.inf))
    moec.compile(model, (X,), verify=False).save(tmp_path / "m.moec")
    assert moec.load(tmp_path / "m.moec").artifact.samples == ()


@pytest.mark.parametrize("row", [0, -1])
def test_a_sample_with_nan_stops_the_saving(row, tmp_path, monkeypatch):
    compiled, call = moec.compile(linear(), (X,), verify=False), Executor.__call__

    def broken(*args):
        results = call(*args)
        next(iter(results.values()))[row, -1] = torch.nan
        return results

    monkeypatch.setattr(Executor, "__call__", broken)
    with pytest.raises(VerificationError, match="holds NaN for the example, and eager's has none"):
        compiled.save(tmp_path / "m.moec")
    assert not any(tmp_path.iterdir())
