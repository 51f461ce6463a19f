"""`moec run` on two ranks that split attention heads: the text of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moec
from moec.commands.execution.text import TextOptions
from moec.parallel.launch import launch
from moec.parallel.process import Job
from moec.plan.plan import write_plan
from tests.command_line import invoke
from tests.once import Once
from tests.parallel import entries
from tests.passes.parallel.test_plan_parallelism import plan

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"
FORMS = {
    "prompt": ("--prompt", "def main(", "--temperature", "1.5", "--seed", "7"),
    "prompts": ("--prompts", "FOLDER/lines.txt", "--batch", "2"),
}


def cli(*arguments: str) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="session")
def folder(once: Once) -> Path:
    return once("text", fill)


def fill(path: Path) -> None:
    """A model of one layer, for one process and for two ranks."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, moe_intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=256, eos_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path / "model")
    (path / "lines.txt").write_text("def main(\nimport torch\nx = 1\n")
    moec.compile(str(path / "model"), verify=False).save(path / "one.moec")
    layer = structs.replace(plan(2).layers[0], attention=2)
    write_plan(structs.replace(plan(2), layers=(layer,)), path / "plan.json")
    model, ranks = str(path / "model"), str(path / "two.ranks")
    result = cli(
        "compile", model, "--plan", str(path / "plan.json"), "-o", ranks, "--verify", "off"
    )
    assert "not as planned" not in result.output


@pytest.mark.parametrize("form", FORMS)
def test_the_text_of_one_process(form: str, folder: Path) -> None:
    """Also where tokens are drawn, and where a string ends a text."""
    options = [option.replace("FOLDER", str(folder)) for option in FORMS[form]]
    options += ["--max-new-tokens", "12", "--stop", "e"]
    one = cli("run", str(folder / "one.moec"), *options, "--quiet")
    two = cli(
        "run", str(folder / "two.ranks"), "--nproc", "2", "--timeout", "300", *options, "--quiet"
    )
    assert one.stdout.strip()
    assert two.stdout == one.stdout


def test_ranks_draw_by_the_seed_of_rank_0(folder: Path) -> None:
    """Without --seed. Rank 1 continues the third text; with a seed of its own it would draw other
    tokens than rank 0 expects."""
    lines = folder / "lines.txt"
    one = cli(
        "run", str(folder / "one.moec"), "--prompts", str(lines), "--temperature", "1.5",
        "--seed", "7", "--max-new-tokens", "12", "--batch", "3", "--json",
    )  # fmt: skip
    options = TextOptions(
        None, lines, None, (), 3, 12, 1.5, 1.0, None, 0.0, 1.0, seed=None, speculate="auto"
    )
    job = Job(folder / "two.ranks", None, None, 300.0, 1)
    result = launch(job, 2, entries.seeded, options, lines.read_text().splitlines())
    assert result["texts"] == json.loads(one.stdout)["texts"]
