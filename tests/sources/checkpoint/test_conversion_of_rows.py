"""Weights that are read later have the values of transformers' conversion, whatever it does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

from moec.sources.checkpoint import load
from moec.sources.checkpoint.conversion import Conversion
from moec.sources.checkpoint.weight import CheckpointWeight
from moec.sources.memory.paged import PagedWeights, ReadsWeights
from moec.sources.memory.spool import Spool

HALVES = ["gate.weight", "up.weight"]
CONVERTERS = {
    "halves": WeightConverter("fused.weight", HALVES, [Chunk(dim=0)]),
    "rows in turn": WeightConverter("fused.weight", HALVES, [Interleave(dim=0), Chunk(dim=0)]),
    "columns": WeightConverter("fused.weight", HALVES, [Transpose(0, 1), Chunk(dim=0)]),
}


class Model(nn.Module):
    base_model_prefix = ""
    config = SimpleNamespace()

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(8, 4, False, "meta") for _ in range(2))


@pytest.mark.parametrize("name", CONVERTERS)
def test_values(name, monkeypatch):
    model, stored = Model(), torch.randn(8, 8)
    conversion = Conversion(model, [], [CONVERTERS[name]], model.state_dict())
    ((target, group),) = conversion.groups(["fused.weight"]).items()
    expected = conversion.convert(target, group, [stored])
    weights = PagedWeights(1 << 20, Spool())
    monkeypatch.setattr(load, "conversion_of", lambda model: conversion)
    source = CheckpointWeight((8, 8), ("fused.weight",), lambda: stored)
    load.page(model, {"fused.weight": source}, weights)
    with ReadsWeights(weights):
        assert torch.equal(model.gate.weight, expected["gate.weight"])
        assert torch.equal(model.up.weight, expected["up.weight"])
