"""tune-grids: the grids of compressed experts, trained on the outputs of the whole model."""

from __future__ import annotations

import torch

from moec.ir.formats.compressed import PARTS, codes_in
from moec.ir.formats.ternary import values
from moec.ir.text import print_graph
from moec.passes.approximate.compress_experts import CompressExperts
from moec.passes.approximate.training.tune_grids import TuneGrids
from tests.passes.changed import change, declined, program, tokens


def test_the_model_comes_closer_and_only_numbers_change():
    """On other tokens of the same kind too."""
    before, after = change(
        program(2),
        CompressExperts(),
        TuneGrids(steps=40, rate=0.01),
        calib={"ids": tokens(1024)},
    )[-2:]
    assert after.damage.after.kl < 0.9 * before.damage.after.kl
    assert after.damage.bytes_before == after.damage.bytes_after
    assert print_graph(after.program.graph) == print_graph(before.program.graph)
    for name, tensor in before.program.weights.items():
        same = torch.equal(tensor, after.program.weights[name])
        assert same == (name.split(".")[-1] != "grid"), name
        assert after.program.weights[name].dtype == tensor.dtype
    assert [line.says.count("%") for line in after.damage.layers] == [3, 3]


def test_signs_stay():
    """However fast numbers change."""
    before, after = change(program(1), CompressExperts(), TuneGrids(steps=20, rate=1))[-2:]
    for name, old in before.program.weights.items():
        if not name.endswith(".grid"):
            continue
        new = after.program.weights[name]
        assert torch.equal(new.sign(), old.sign())


def test_it_is_deterministic_and_the_seed_orders_the_cases():
    calib = {"ids": tokens(4096)}
    changed = [
        change(program(1), CompressExperts(), TuneGrids(steps=3, seed=seed), calib=calib)[-1]
        for seed in (0, 0, 1)
    ]
    first, again, other = (step.program.weights["layers.0.w1.grid"] for step in changed)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_codes_come_back_as_they_were_stored():
    changed = change(program(1), CompressExperts())[-1].program
    parts = [changed.weights[f"layers.0.w2.{part}"] for part in PARTS]
    codes = codes_in(parts, 6)
    assert codes.shape == (4, 8, 6)
    assert ((values(codes, parts[-1]) == 0) == (codes == 0)).all()


def test_experts_that_are_not_compressed_are_declined():
    assert declined(program(1), TuneGrids()) == (
        "the experts are not compressed: run compress-experts first"
    )


def test_the_budget_undoes_layers():
    """One great step of all numbers at once does harm."""
    error = change(program(1), CompressExperts())[-1].damage.after.error
    wild = TuneGrids(steps=1, rate=0.9)
    step = change(program(1), CompressExperts(), wild, limit=f"error<={1.001 * error}")[-1]
    assert [line.undone for line in step.damage.layers] == [True]
    assert step.damage.after.error == error
