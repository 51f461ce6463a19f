"""moec export: its options, the output, and the exit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from moec.commands.export import render
from moec.export.onnx import Exported
from moec.report.data import MovedLine
from tests.command_line import invoke

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            y = y.index_add(0, token, expert(x[token]).relu() * weights[token, slot, None])
        return y

def block():
    torch.manual_seed(0)
    return Block(), (torch.randn(5, 8),)

def folding():
    class Folding(nn.Module):
        def forward(self, x):
            return x.unfold(1, 3, 2)
    return Folding(), (torch.randn(5, 8),)
"""


run = partial(invoke, "export")


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(FACTORY)
    return f"{path}:"


def test_writes_the_file_and_says_what_it_is(factory: str, tmp_path: Path) -> None:
    out = tmp_path / "block.onnx"
    result = run(factory + "block", "-o", out, "--ep", "portable", "--opset", "21")
    assert result.exit_code == 0, result.stderr
    assert "MoE blocks  1 as sorted rows, one product per expert and projection\n" in result.stdout
    assert "100.00% of the tokens chose eager's experts in each block\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"wrote {out} (")
    assert onnx.load(out).opset_import[0].version == 21
    phases = list(dict.fromkeys(line.split()[3] for line in result.stderr.splitlines()))
    assert phases == ["start", "capture", "passes", "lower", "write", "check", "run", "done"]


def test_json_is_one_document(factory: str, tmp_path: Path) -> None:
    out = tmp_path / "block.onnx"
    report = json.loads(run(factory + "block", "-o", out, "--json").stdout)
    assert (report["path"], report["ep"], report["opset"]) == (str(out), "cpu", 23)
    assert report["forms"] == {"(whole model)": "rows"}


def test_changed_models_reach_the_file(factory: str, tmp_path: Path) -> None:
    """Half of the experts pruned, the others in eight bits; compared with what that means."""
    out, calib = tmp_path / "block.onnx", tmp_path / "calib.npz"
    np.savez(calib, x=np.random.default_rng(0).standard_normal((64, 8), dtype=np.float32))
    result = run(
        factory + "block", "-o", out, "-q", "--json", "--ep", "portable", "--quant", "int8",
        "--passes", "+prune-experts(keep=0.5,by=reap)", "--calib", calib,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["quant"] == "int8"
    assert report["errors"]["output"] <= report["tolerance"]
    kinds = [node.op_type for node in onnx.load(out).graph.node]
    assert kinds.count("DequantizeLinear") == 2


def test_a_budget_needs_a_pass_that_it_is_for(factory: str, tmp_path: Path) -> None:
    result = run(factory + "block", "-o", tmp_path / "o.onnx", "-q", "--budget", "error<=0.1")
    assert result.exit_code == 2
    assert (
        "--budget limits passes that change the model, and no such pass was requested"
        in result.stderr
    )


def test_a_cache_that_cannot_be_is_refused(factory: str, tmp_path: Path) -> None:
    result = run(factory + "block", "-o", tmp_path / "out.onnx", "-q", "--cache")
    assert result.exit_code == 1
    assert "block cannot be exported with a cache: the model returns no logits" in result.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_what_has_no_form_is_said_and_nothing_written(factory: str, tmp_path: Path) -> None:
    result = run(factory + "folding", "-o", tmp_path / "out.onnx", "-q")
    assert result.exit_code == 1
    assert "operator aten.unfold.default has no ONNX form" in result.stderr
    assert not (tmp_path / "out.onnx").exists()


WRONG = [
    (2, [], "name the file with -o OUT.onnx or -o OUT.gguf"),
    (2, ["-o", "out.pb"], "out.pb: give the file a name that ends in .onnx or .gguf"),
    (2, ["-o", "x.pb", "--format", "onnx"], "x.pb: give the file a name that ends in .onnx"),
    (2, ["-o", "x.gguf", "--ep", "cpu"], "--ep is of ONNX files: leave it out for x.gguf"),
    (2, ["-o", "x.gguf", "--quant", "int8"], "--quant int8: a GGUF file has bf16, q8_0, q4_0"),
    (1, ["-o", "none/out.onnx"], "the folder none does not exist"),
    (2, ["-o", "x.onnx", "--ep", "tpu"], "'tpu' is not one of cpu, cuda, portable"),
]


@pytest.mark.parametrize(("code", "arguments", "words"), WRONG)
def test_wrong_arguments(code: int, arguments: list[str], words: str) -> None:
    result = run("model", *arguments)
    assert result.exit_code == code
    assert words in result.stderr


def test_an_existing_file_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_text("mine")
    result = run("model", "-o", out)
    assert f"{out} exists; --force replaces it" in result.stderr
    assert out.read_text() == "mine"


def test_a_gguf_file(tiny_moe: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "model.bin"
    result = run(tiny_moe, "-o", out, "--format", "gguf", "--quant", "q8_0")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[:3] == [
        "for         llama.cpp, qwen3moe",
        "tensors     29 Q8_0, 21 F32",
        "text        1024 tokens",
    ]
    assert invoke("inspect", out).stderr.startswith("tensors     29 Q8_0, 21 F32\n")
    report = json.loads(run(tiny_moe, "-o", out, "--format", "gguf", "--force", "--json").stdout)
    assert report["types"] == {"BF16": 29, "F32": 21}


def test_a_gguf_file_is_written_of_a_folder(factory: str, tmp_path: Path) -> None:
    result = run(factory + "block", "-o", tmp_path / "out.gguf")
    assert "is no folder with a checkpoint, which a GGUF file is written of" in result.stderr


FEW_BITS = Exported(
    path="model.onnx",
    ep="cpu",
    opset=23,
    nodes=86,
    moe_nodes=20,
    bytes=12_345_678,
    forms={"layers.0.moe": "op", "layers.1.moe": "op"},
    errors={"logits": 3.2e-2},
    tolerance=3e-2,
    parity={"layers.0.moe": 1.0, "layers.1.moe": 0.998},
    quant="int4:32",
    moved=(MovedLine("logits", 0.0312, 2, 40),),
)


def test_report_of_few_bits(golden: Callable[[str], None]) -> None:
    golden(render(FEW_BITS))


def test_report(golden: Callable[[str], None]) -> None:
    exact = replace(FEW_BITS, quant="", moved=(), errors={"logits": 3.2e-7}, tolerance=1e-4)
    forms = {"layers.0.moe": "op", "layers.1.moe": "rows"}
    note = "written for CUDA and checked on the CPU: no CUDA kernel was run"
    file = replace(exact, ep="cuda", nodes=300, moe_nodes=100, forms=forms, caches=2, notes=(note,))
    golden(render(file))
