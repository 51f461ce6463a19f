"""A recording contains the choices of eager's routers, token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM

import moec
from moec.errors import ArtifactError, InputError, UsageError
from moec.runtime.artifact import manifest
from moec.runtime.artifact.manifest import Manifest
from moec.runtime.call.recorder import Recorder
from moec.runtime.call.routing_trace import load_trace
from moec.runtime.package import RECORDED, Package, RecordedLayer
from tests.capture.modules import WIDTH, Moe


@pytest.fixture(scope="module")
def compiled(short_moe: Path) -> moec.CompiledModel:
    return moec.compile(short_moe, dtype="float32", verify=False, record_routing=True)


@pytest.fixture(scope="module")
def artifact(compiled: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "short.moec"
    compiled.save(path)
    return path


def eager_choices(checkpoint: Path, ids: torch.Tensor) -> NDArray[np.int64]:
    """The experts of every token in every layer [T, L, k], ascending, as eager routes in f32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, out: chosen.append(out[-1]))
    with torch.no_grad():
        model(ids)
    return np.sort(torch.stack(chosen, 1).numpy(), -1)


def test_a_forward(compiled: moec.CompiledModel, short_moe: Path) -> None:
    ids = torch.arange(3 * 7).reshape(3, 7) * 31 % 900
    plain = compiled(ids)
    with compiled.record_routing() as routing:
        recorded = compiled(ids)
    trace = routing.trace()
    assert torch.equal(plain, recorded)
    assert np.array_equal(np.sort(trace.ids, -1), eager_choices(short_moe, ids))
    assert trace.experts.tolist() == [8, 8]
    assert trace.phase.tolist() == [0] * 21
    assert np.array_equal(trace.request - trace.request[0], np.repeat([0, 1, 2], 7))


def test_texts_of_unequal_lengths(compiled: moec.CompiledModel, short_moe: Path) -> None:
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    with compiled.record_routing() as routing:
        texts = compiled.generate(prompts, max_new_tokens=3)
    trace = routing.trace()
    assert texts == compiled.generate(prompts, max_new_tokens=3)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        request = trace.request - trace.request.min() == number
        expected = eager_choices(short_moe, torch.tensor([text[:-1]]))
        ids = np.sort(trace.ids[request], -1)
        assert trace.phase[request].tolist() == [0] * len(prompt) + [1] * 2
        assert np.array_equal(ids[:, 0], expected[:, 0])
        last = len(prompt) - 1  # the last layer routes no other token of a prompt
        assert (ids[:last, 1] == -1).all()
        assert np.array_equal(ids[last:, 1], expected[last:, 1])


def test_the_command(artifact: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.npz"
    command = [sys.executable, "-m", "moec", "run", str(artifact), "--prompt", "def", "--json"]
    run = subprocess.run(
        [*command, "--max-new-tokens", "4", "--record-routing", str(trace)],
        capture_output=True,
        text=True,
        check=True,
    )
    output = json.loads(run.stdout)
    assert load_trace(trace).tokens == output["prompt_tokens"] + len(output["tokens"]) - 1


@pytest.mark.parametrize(
    ("name", "words"),
    [("t.txt", "must end in .npz"), ("nodir/t.npz", "nodir does not exist")],
)
def test_files_that_cannot_be_written(
    artifact: Path, tmp_path: Path, name: str, words: str
) -> None:
    command = [sys.executable, "-m", "moec", "run", str(artifact), "--prompt", "x"]
    run = subprocess.run(
        [*command, "--record-routing", str(tmp_path / name)], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (2 if name == "t.txt" else 1, "")
    assert words in run.stderr


def test_two_at_once(compiled: moec.CompiledModel) -> None:
    with compiled.record_routing() as routing:
        with (
            pytest.raises(InputError, match="is already being recorded"),
            compiled.record_routing(),
        ):
            pass
        compiled(torch.zeros(1, 1, dtype=torch.int64))
    assert routing.trace().tokens == 1


def test_nothing_ran(compiled: moec.CompiledModel) -> None:
    with compiled.record_routing() as routing:
        pass
    with pytest.raises(InputError, match="no call was recorded"):
        routing.trace()


def test_compiled_without() -> None:
    model = moec.compile(Moe().eval(), (torch.randn(2, 3, WIDTH),), verify=False)
    with (
        pytest.raises(InputError, match="compile it with --record-routing"),
        model.record_routing(),
    ):
        pass


def test_a_model_that_does_not_route() -> None:
    with pytest.raises(UsageError, match="no layer routes tokens to experts"):
        moec.compile(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), record_routing=True)


def test_choices_that_are_no_expert() -> None:
    """Sentinels, and the last token alone of a padded piece."""
    recorder = Recorder((RecordedLayer("a", 4), RecordedLayer("b", 2)))
    a = np.array([[0, 4], [1, 2], [3, 0], [1, 1]])
    recorder.add_decode([a, np.array([[1], [0]])], np.array([2, 1]), 2, np.array([7, 8], np.int32))
    trace = recorder.trace()
    assert trace.ids.tolist() == [[[0, -1], [-1, -1]], [[1, 2], [1, -1]], [[3, 0], [0, -1]]]
    assert trace.request.tolist() == [7, 7, 8]


def forged(artifact: Path, package: Package) -> bytes:
    opened = moec.load(artifact).artifact.manifest
    return manifest.dump(replace(opened, package=package))


def test_forged_recordings(artifact: Path) -> None:
    """The executor trusts that recorded functions differ in their last outputs alone."""
    opened: Manifest = moec.load(artifact).artifact.manifest
    package, recorded = opened.package, opened.package.functions[RECORDED]
    cases = [
        replace(package, recorded=()),
        replace(package, recorded=package.recorded[:1]),
        replace(package, functions={**package.functions, RECORDED: package.main}),
        replace(
            package,
            functions={
                **package.functions,
                RECORDED: replace(recorded, outputs=recorded.outputs[1:]),
            },
        ),
    ]
    for case in cases:
        with pytest.raises(ArtifactError, match="recorded"):
            manifest.load(forged(artifact, case))
