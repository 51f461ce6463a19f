"""A denoiser whose routers read the prompt and the timestep, as RAPHAEL's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.errors import ArtifactError, InputError
from moec.model.rebuild import rebuild
from moec.runtime.artifact.artifact import read
from moec.runtime.call import executor
from tests.capture.modules import WIDTH, Moe
from tests.runtime.damaged import edit_manifest, unpacked

D, H, E, STEPS = 8, 12, 4, 10


class Layer(nn.Module):
    """One expert for the whole picture, by what its router is given."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.w1, self.w2 = (nn.Parameter(torch.randn(E, *s) / 3) for s in ((H, D), (D, H)))

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        logits = self.gate(key)[:, None].expand(-1, x.shape[1], E).reshape(-1, E)
        weights, ids = logits.softmax(-1).topk(1, -1)
        t = x.reshape(-1, D)
        hidden = F.gelu(torch.einsum("td,tkhd->tkh", t, self.w1[ids]))
        y = (torch.einsum("tkh,tkdh->tkd", hidden, self.w2[ids]) * weights[..., None]).sum(1)
        return x + y.reshape(x.shape)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.times, self.mix = nn.Embedding(STEPS, D), nn.Linear(D, D)
        self.by_text, self.by_time = Layer(), Layer()

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x = self.mix(x)
        return self.by_time(self.by_text(x, text), self.times(time))


B, S = torch.export.Dim("B", min=2), torch.export.Dim("S", min=2)
x, text, time = torch.randn(2, 5, D), torch.randn(2, D), torch.tensor([3, 3])


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser()


@pytest.fixture(scope="module")
def compiled(model: Denoiser) -> Any:
    return moec.compile(
        model,
        (x, text, time),
        dynamic_shapes=({0: B, 1: S}, {0: B}, {0: B}),
        passes="+hoist-routers",
    )


def test_choices_are_known_before_the_model_runs(compiled: Any, model: Denoiser) -> None:
    choices = compiled.routers(x=x, text=text, time=time)
    assert list(choices) == ["by_text", "by_time"]
    with torch.no_grad():
        chosen = model.by_text.gate(text).argmax(-1)
    assert torch.equal(choices["by_text"]["experts"].reshape(2, 5), chosen[:, None].expand(2, 5))
    torch.testing.assert_close(
        compiled.routed(choices, x, text, time), compiled(x, text, time), rtol=0, atol=0
    )


def test_a_loop_over_steps_asks_the_router_of_the_text_once(compiled: Any, model: Denoiser) -> None:
    remaining = compiled.routers(x, text, time)["by_text"]
    latents = x
    for step in range(3):
        now = torch.tensor([step, step])
        choices = {**compiled.routers(x, torch.zeros_like(text), now), "by_text": remaining}
        latents = compiled.routed(choices, latents, text, now)
    right = x
    with torch.no_grad():
        for step in range(3):
            right = model(right, text, torch.tensor([step, step]))
    torch.testing.assert_close(latents, right, rtol=1e-5, atol=1e-5)


def test_routers_of_one_input_are_asked_alone(compiled: Any) -> None:
    """What a prompt decides needs no time, and what a time decides no prompt."""
    every = compiled.routers(x, text, time)
    for name, inputs in (("by_text", {"x": x, "text": text}), ("by_time", {"x": x, "time": time})):
        (alone,) = compiled.routers(**inputs).items()
        assert alone[0] == name
        for kind, value in alone[1].items():
            assert torch.equal(value, every[name][kind])
    with pytest.raises(InputError, match="text"):
        compiled.routers(x=x)


def test_the_report_says_so(compiled: Any) -> None:
    report = " ".join(str(compiled.report()).split())
    assert "by_text: its experts depend on text only" in report
    assert "by_time: its experts depend on time only" in report


def test_artifacts_keep_the_functions(compiled: Any, tmp_path: Path) -> None:
    path = tmp_path / "denoiser.moec"
    compiled.save(path)
    loaded = moec.load(path)
    numbers = [t.numpy() for t in (x, text, time)]
    choices = loaded.routers(*numbers)
    np.testing.assert_array_equal(loaded.routed(choices, *numbers), loaded(*numbers))
    again = executor.Executor(rebuild(read(path)))
    inputs = dict(zip(("x", "text", "time"), numbers, strict=True))
    inputs = {port.name: inputs[port.name] for port in again.package.functions["route"].inputs}
    for name, array in again(inputs, "route").items():
        np.testing.assert_array_equal(array, loaded.executor(inputs, "route")[name])


def test_a_graph_that_is_missing(compiled: Any, tmp_path: Path) -> None:
    compiled.save(full := tmp_path / "denoiser.moec")
    path = unpacked(full)
    edit_manifest(path, lambda text: text["parts"].pop("graphs/routed.moec"))
    with pytest.raises(ArtifactError, match=r"has no graphs/routed\.moec; compile or copy"):
        read(path)


def test_a_function_that_is_missing(compiled: Any, tmp_path: Path) -> None:
    compiled.save(path := tmp_path / "denoiser.moec")
    model = moec.load(path).executor
    with pytest.raises(
        InputError, match=r"no function 'decode'; it has main, route, route_part_1, "
    ):
        model({}, "decode")


def test_mistakes(compiled: Any) -> None:
    with pytest.raises(InputError, match="the model takes 3 inputs"):
        compiled.routers(x, text, time, x)
    with pytest.raises(InputError, match="the experts of by_text are missing: pass the result of"):
        compiled.routed({}, x, text, time)
    choices = compiled.routers(x, text, time)
    short = {"experts": choices["by_time"]["experts"][:3], "weights": torch.ones(10, 1)}
    with pytest.raises(InputError, match="is 3, expected 10"):
        compiled.routed({**choices, "by_time": short}, x, text, time)


def test_a_model_without_such_routers() -> None:
    hidden = nn.Sequential(nn.Linear(WIDTH, WIDTH), Moe())
    compiled_model = moec.compile(hidden, (torch.randn(5, WIDTH),), passes="+hoist-routers")
    (declined,) = [d for d in compiled_model.declined if d.rule == "hoist-routers"]
    assert "its router reads hidden states" in declined.reason
    with pytest.raises(InputError, match="no router of this model runs separately"):
        compiled_model.routers(torch.randn(5, WIDTH))
