"""Text from two ranks: six families in one pair of processes give the tokens of one process."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

import moec
from moec.errors import ArtifactError, UnsupportedError
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from moec.parallel.build import TextFiles, save_ranks
from moec.parallel.compile import compile_function
from moec.parallel.launch import launch
from moec.parallel.process import Job
from moec.parallel.store import code_file, load_rank
from moec.passes.core.runner import Log
from moec.passes.decode import incremental
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.plan.inputs.workload import Workload
from moec.plan.placement.placement import place
from moec.plan.plan import LayerPlan, Plan
from moec.runtime.artifact import manifest as manifests
from moec.runtime.package import DECODE, MAIN
from moec.runtime.text.request import Request
from moec.target import cpu
from moec.verify.ranks import Ranked, check_ranks
from tests.models.families import FAMILIES, Family
from tests.once import Once
from tests.parallel import entries

NAMES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
# Attention of these is cut by heads, and caches too; of deepseek_v3 it is latent attention.
SHARED_HEADS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
TWO_FUNCTIONS = ("olmoe",)
PROMPTS = ((5, 9, 12, 7, 33), (100, 3), (64,))  # two on rank 0, one on rank 1
TOKENS = 6


def family_of(name: str) -> Family:
    """One layer where that is an MoE layer; of mixtral two, so that prompts pass experts too."""
    if name in ("mixtral", "deepseek_v2", "deepseek_v3"):
        return FAMILIES[name]
    return FAMILIES[name].one_layer()


def plan_for(program: moec.CompiledModel, attention: int, copies: int) -> Plan:
    """Experts on two ranks, the first `copies` experts on both, after dense layers."""
    graph = program.pass_results[-1].program.graph
    counts = [int(op.inputs[2].shape[0]) for op in graph.ops if op.name == "moe.experts"]
    depth = sum(op.name == "nn.attention" for op in graph.ops)
    dense = LayerPlan(layer=0, experts=0, attention=attention, seconds={})
    layers = tuple(
        LayerPlan(
            layer=number,
            experts=experts,
            attention=attention,
            ranks=2,
            slices=1,
            copies=1,
            form="flat",
            slots=place(np.linspace(2, 1, experts), 2, experts + copies).slots,
            seconds={},
        )
        for number, experts in enumerate(counts)
    )
    return Plan(
        model="test",
        cluster="test",
        devices=2,
        node_size=2,
        workload=Workload(tokens=1, sequences=0, context=0),
        routing="",
        layers=(*(dense,) * (depth - len(counts)), *layers),
        seconds=0.0,
        memory=0.0,
        memory_limit=0.0,
    )


def save(name: str, folder: Path, family: Family) -> None:
    """With equal numbers of experts, ranks share a library; mixtral's have different numbers. Those
    in `TWO_FUNCTIONS` also have the function without caches."""
    compiled = moec.compile(
        family.build(), (), family.inputs(2, 5), verify=False, stop_after="split-packed"
    )
    program = compiled.pass_results[-1].program
    plan = plan_for(compiled, 2 if name in SHARED_HEADS else 1, 1 if name == "mixtral" else 2)
    step = incremental(program)
    log = Log()
    decode = rank_programs(step, plan, log, DECODE)
    module = decode
    if name in TWO_FUNCTIONS:
        module = Module({**rank_programs(program, plan, log).programs, **decode.programs})
    assert not log.declined
    if name in SHARED_HEADS:
        check_ranks(compiled.captured, Ranked(step, decode, plan, DECODE))
    save_ranks(module, plan, folder / f"{name}.ranks", text=TextFiles(stop=(2,)))


def fill(path: Path) -> None:
    """The ranks of every family, and what they generate."""
    for name in NAMES:
        save(name, path, family_of(name))
    job = Job(path / f"{NAMES[0]}.ranks", None, None, 300.0, 1)
    result = launch(job, 2, entries.families, PROMPTS, Request(TOKENS))
    (path / "results").write_bytes(pickle.dumps(result))


@pytest.fixture(scope="session")
def folder(once: Once) -> Path:
    return once("families", fill)


@pytest.fixture(scope="session")
def results(folder: Path) -> dict[str, entries.Text]:
    return cast("dict[str, entries.Text]", pickle.loads((folder / "results").read_bytes()))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_logits_of_one_process(name: str, results: dict[str, entries.Text]) -> None:
    model = family_of(name).build()
    for prompt, tokens, logits in zip(
        PROMPTS, results[name].tokens, results[name].logits, strict=True
    ):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = model.generate(
                ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            right = model(ids, use_cache=False).logits[0, -1]
        assert tokens == expected[0, len(prompt) :].tolist()
        # Sums over a hidden width of 64 in another order, through two layers.
        np.testing.assert_allclose(np.array(logits), right.numpy(), rtol=1e-5, atol=2e-6)


def test_fewer_texts_than_ranks(results: dict[str, entries.Text]) -> None:
    """A rank without texts takes part; a seed gives the tokens of one process."""
    alone = results[f"{NAMES[0]} alone"]
    assert alone.tokens[0] == results[NAMES[0]].tokens[0]


@pytest.mark.parametrize("name", TWO_FUNCTIONS)
def test_the_functions_share_weights(name: str, folder: Path) -> None:
    """By content: their names in the two graphs may differ."""
    files = [folder / f"{name}.ranks" / code_file(1, f) for f in (MAIN, DECODE)]
    main, decode = (manifests.load(file.read_bytes()).arrays.values() for file in files)
    large = {array.part for array in decode if array.nbytes > 1024}
    assert large
    assert large <= {array.part for array in main}
    assert load_rank(folder / f"{name}.ranks", 1, DECODE).stop == (2,)


def test_a_model_without_text(two_ranks: Path) -> None:
    with pytest.raises(ArtifactError, match="does not continue text: its attention is not causal"):
        load_rank(two_ranks, 0, DECODE)


def test_a_state_that_is_no_cache() -> None:
    graph = parse("""
graph main(x: f32[T, 4], s: f32[2, 4];) {
  size T in [0, inf]
  y: f32[T, 4] = aten.silu.default(x)
  z: f32[2, 4] = aten.silu.default(s)
  state s -> z
  return y
}""")
    with pytest.raises(UnsupportedError, match="the state s is not a cache of keys and values"):
        list(compile_function([Program(graph, {"s": torch.zeros(2, 4)})], MAIN, cpu.host()))
