"""Experts of one stack in several formats: the pass, its meaning, its refusals, and other doors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from moec.errors import IRError, UsageError
from moec.ir.formats.notation import parse
from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse as read
from moec.ir.text import print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.quantise.fixed_formats import FixedFormats
from moec.passes.quantise.mixed_experts import ExpertFormats
from tests.passes.quantise.test_quantise_experts import GRAPH, quantised
from tests.passes.quantise.test_quantise_experts import program as program_of
from tests.zoo.two_layers import Experts

THREE = GRAPH.replace("i32[2]", "i32[3]").replace("f32[2, 64, 32]", "f32[3, 64, 32]")
THREE = THREE.replace("f32[2, 32", "f32[3, 32")
MIX = ExpertFormats(parse("int8"), ((parse("int2:32"), (1,)),))
WIDTH = 64


def program() -> Program:
    return program_of(THREE)


def mixed(of: Program, format: ExpertFormats = MIX) -> PassResult:
    formats = {"mlp.experts": format, "mlp.experts#2": format}
    return run(of, [FixedFormats(formats)], stage=Stage.GROUPED)[-1]


def test_text(golden):
    golden(print_graph(mixed(program()).program.graph))


def test_each_expert_means_what_it_means_in_a_stack_of_its_format():
    before = program()
    after = mixed(before).program
    order, ends = torch.randperm(12).int(), torch.tensor([3, 9, 11]).int()
    x = [torch.randn(6, WIDTH), order, ends, torch.rand(6, 2)]
    (result,) = evaluate(after.graph, x, after.weights)
    for text, rows in (("int8", [*range(3), *range(9, 12)]), ("int2:32", [*range(3, 9)])):
        alone = quantised(before, text).program
        (expected,) = evaluate(alone.graph, x, alone.weights)
        assert torch.equal(result[rows], expected[rows])


def test_all_experts_in_one_format_are_a_stack_of_it():
    every = ExpertFormats(parse("int4:32"), ((parse("int8"), (0, 1, 2)),))
    graph = mixed(program(), every).program.graph
    assert [op.attrs.get("kind") for op in graph.ops if op.name == "grouped.quantised"] == [
        "int8"
    ] * 2


@pytest.mark.parametrize(
    ("format", "words"),
    [
        (ExpertFormats(parse("int8"), ((parse("int4:64"), (0,)),)), "blocks of 64 do not divide"),
        (ExpertFormats(parse("int8"), ((parse("fp8"), (0,)),)), "and fp8 does not"),
        (ExpertFormats(parse("int8"), ((parse("int4:rows16"), (0,)),)), "rows16 does not"),
        (
            ExpertFormats(parse("int8"), ((parse("int4"), (3,)),)),
            "expert 3 has a format, and there",
        ),
    ],
)
def test_declines(format, words):
    result = mixed(program(), format)
    assert any(words in declined.reason for declined in result.declined)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('("int8", "int2:32")', '("int8", "int2")', "bf16[1, 32, 2] of int2"),
        ('("int8", "int2:32")', '("int8", "int7")', "'int7' is not a format"),
        ('("int8", "int2:32")', '("int8", "int8")', "are repeated"),
        ("(0, 1, 0)", "(0, 0, 0)", "not each of 2"),
        ("(0, 1, 0)", "(0, 1, 1)", "u8[2, 32, 64] for 1 experts"),
        ("ends: i32[3]", "ends: i32[4]", "3 experts for"),
    ],
)
def test_rules_of_the_op(before, after, words):
    text = print_graph(mixed(program()).program.graph)
    assert before in text
    with pytest.raises(IRError) as raised:
        verify(read(text.replace(before, after)), Stage.GROUPED)
    assert words in str(raised.value)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return Experts()


ARGS = (torch.randn(5, WIDTH),)
CHOICES = """
limits: memory 9 kB
bytes: 9000
token_bytes: 9000
metric: kl
damage: 0.0
predicted: 0.0
codes: nearest
products:
  (whole model): {rows: 64, columns: 64, format: int8, bytes: 1, bytes_before: 1, damage: 0.0,
    experts: {int2:32: [1], "int4:32": [3]}}
layers: {}
"""


def choices(folder: Path, text: str = CHOICES) -> Path:
    (path := folder / "plan.yaml").write_text(text)
    return path


def test_a_file_of_choices_names_experts_by_number(net, tmp_path):
    model = moec.compile(net, ARGS, choices=choices(tmp_path))
    (line,) = model.quantised
    assert line.format == "int8 and int2:32 and int4:32"
    assert line.covered == line.parts == 4
    assert line.bytes_after == 2 * (64 * 66) + 64 * (16 + 4) + 64 * (32 + 4)
    assert "int8 (1 experts int2:32, 1 experts int4:32)" in "\n".join(model.report().notes)
    model.save(tmp_path / "m.moec")
    assert torch.equal(moec.load(tmp_path / "m.moec")(*ARGS), model(*ARGS))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("[3]", "[4]", "expert 4 has a format, and there are 4 experts"),
        ("[3]", "[1]", "an expert has two formats: give each number once"),
        ("[3]", "[-1]", "Expected `int` >= 0"),
        ("format: int8", "format: unchanged", "unchanged is for all experts of a product"),
        ('"int4:32"', "fp8", "fp8 is for all experts of a product: give single ones"),
        ('"int4:32"', "int7", "'int7' is not a format"),
        (
            "layers: {}",
            "layers: {a: {experts: [0], of: 4, top_k: 1, top_k_before: 1}}",
            "experts have formats by number, and a layer drops, merges or replaces some",
        ),
    ],
)
def test_files_that_are_refused(before, after, words, net, tmp_path):
    with pytest.raises(UsageError, match=words):
        moec.compile(net, ARGS, choices=choices(tmp_path, CHOICES.replace(before, after)))


def test_calibrated_codes_are_nearer(net, tmp_path):
    path = choices(tmp_path, CHOICES.replace("codes: nearest", "codes: gptq"))
    data = torch.randn(600, WIDTH) @ torch.randn(WIDTH, WIDTH)
    (line,) = moec.compile(net, ARGS, choices=path, calib={"x": data}, build=False).quantised
    assert line.solved < 0.9 * line.nearest
    few = torch.cat([data[:1]] * 4)
    (line,) = moec.compile(net, ARGS, choices=path, calib={"x": few}, build=False).quantised
    assert line.few == (0, 1, 2, 3)


def test_doors_that_have_no_such_kernels(net, tmp_path):
    path = choices(tmp_path)
    with pytest.raises(UsageError, match="--store reads experts of one format"):
        moec.compile(net, ARGS, choices=path, store=True)
    with pytest.raises(
        moec.MoecError, match="experts of several formats have kernels for CPUs only"
    ):
        moec.compile(net, ARGS, choices=path, target="cuda:sm_80", verify=False)
    with pytest.raises(moec.MoecError, match="experts of several formats have no ONNX form"):
        moec.compile(net, ARGS, choices=path, build=False).export_onnx(tmp_path / "m.onnx")
