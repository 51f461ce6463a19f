"""Families of models with a part of their experts in memory compute the bits of all in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moec
from moec.runtime.artifact.artifact import read
from moec.runtime.call.executor import start
from moec.runtime.expert_store.device import DIRECT
from moec.runtime.expert_store.start import start_with_slots
from tests.models.families import FAMILIES

CASES = (
    ("gpt_oss", None),  # biases of experts
    ("jetmoe", None),  # experts in attention too, with one product a layer
    ("llama4", None),  # weights of choices on the rows of the input
    ("switch_transformers", None),  # no decode
    ("mixtral", "int8:rows16"),
    ("mixtral", "mxfp4"),
)


@pytest.mark.parametrize(("name", "quant"), CASES)
def test_bits(name, quant, tmp_path):
    family, path = FAMILIES[name], tmp_path / "model.moec"
    inputs = family.inputs(2, 7)
    model = moec.compile(
        family.build(), kwargs=inputs, store=True, verify=False, quant=quant, opt_level=2
    )
    model.save(path)
    ids = {k: v.numpy() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    right = start(read(path))(ids)
    opened = read(path)
    assert opened.package.store is not None
    for slots in (1, 2):
        held = start_with_slots(opened, [slots] * len(opened.package.store.layers), DIRECT)
        for name_of_output, value in held(ids).items():
            np.testing.assert_array_equal(value, right[name_of_output])
