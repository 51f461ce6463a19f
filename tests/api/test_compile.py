"""moec.compile: its arguments, its result, and its errors."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moec
from moec.codegen.cpu import link
from moec.errors import (
    CaptureError,
    InputError,
    MoecError,
    TargetError,
    UnsupportedError,
    UsageError,
)
from moec.report.data import WHOLE
from moec.runtime.artifact import artifact
from moec.target import cpu as targets
from moec.target.cpu import TARGETS
from tests.capture.modules import WIDTH, Function, Moe

x = torch.randn(5, WIDTH)
TOLERANCE = 1e-5  # float32, sums of eight


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.fixture(scope="module")
def model() -> Moe:
    return Moe()


@pytest.fixture(scope="module")
def compiled(model: Moe) -> moec.CompiledModel:
    rows = torch.export.Dim("rows", max=64)
    return moec.compile(model, x, dynamic_shapes={"x": {0: rows}})


def test_torch_gives_torch_and_numpy_gives_numpy(model: Moe, compiled: moec.CompiledModel) -> None:
    y = compiled(x=x.numpy())
    assert isinstance(y, np.ndarray)
    assert close(torch.from_numpy(y), model(x))
    assert close(compiled(x), model(x))
    assert repr(compiled).startswith("<Moe, compiled for ")


def test_a_saved_model_equals_eager(
    model: Moe, compiled: moec.CompiledModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.moec"
    compiled.save(path)
    assert close(moec.load(path)(x), model(x))


def test_a_model_that_is_one_block_names_its_kernels(compiled: moec.CompiledModel) -> None:
    (block,) = compiled.blocks
    assert block.name == WHOLE
    assert {"dispatch", "combine"} <= set(block.kernel.split(", "))


@pytest.mark.parametrize("rows", [0, 1, 64])
def test_every_number_of_rows_within_the_bounds(
    model: Moe, compiled: moec.CompiledModel, rows: int
) -> None:
    x = torch.randn(rows, WIDTH)
    y = compiled(x)
    assert y.shape == (rows, WIDTH)
    assert close(y, model(x))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.randn(65, WIDTH), "axis 0 of input 'x' is 65, and the model was compiled for rows"),
        (torch.randn(5, 9), "axis 1 of input 'x' is 9, expected 8"),
        (torch.randn(5), "input 'x' has 1 axes [5], expected 2: [rows, 8]"),
        (x.double(), "input 'x' is f64, expected f32; convert it"),
        ([1.0], "input 'x' is a list, expected a tensor f32[rows, 8]"),
    ],
)
def test_inputs_that_do_not_fit(compiled: moec.CompiledModel, inputs: Any, words: str) -> None:
    with pytest.raises(InputError) as raised:
        compiled(inputs)
    assert words in str(raised.value)


def test_too_many_inputs_and_wrong_names(compiled: moec.CompiledModel) -> None:
    with pytest.raises(InputError, match=r"takes 1 inputs \(x\), but 2 were given"):
        compiled(x, x)
    with pytest.raises(InputError, match="input x was given twice, by position and by name"):
        compiled(x, x=x)
    with pytest.raises(InputError, match="there is no input 'y'"):
        compiled(y=x)
    with pytest.raises(InputError, match="input 'x' is missing"):
        compiled()


def test_rows_of_nan_stay_where_they_are(model: Moe, compiled: moec.CompiledModel) -> None:
    """A row of NaN is eager's NaN row, and its neighbours do not notice."""
    tokens = x.clone()
    tokens[2] = float("nan")
    y, expected = compiled(tokens), model(tokens)
    assert torch.equal(y.isnan(), expected.isnan())
    assert close(y, expected)


def test_a_layer_in_float64() -> None:
    """Its logits are sums in float64, and its router ranks them in float32."""
    model = Moe(torch.float64).eval()
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    compiled = moec.compile(model, (x,))
    assert [block.router for block in compiled.blocks] == ["softmax, top-2"]
    assert any("the logits are f64" in d.reason for d in compiled.declined)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)


def test_two_threads_and_two_models(model: Moe, compiled: moec.CompiledModel) -> None:
    """Calls from several threads, on two models side by side, each give their own result."""
    other_model = nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU())
    other = moec.compile(other_model, (x,))
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for rows in range(1, 30):
            tokens = torch.randn(rows, WIDTH, generator=generator)
            with torch.no_grad():
                if not close(compiled(tokens), model(tokens)):
                    wrong.append(f"moe at {rows} rows")
                if not close(other(tokens), other_model(tokens)):
                    wrong.append(f"dense at {rows} rows")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_models_are_compiled_side_by_side() -> None:
    """torch.export and TVM's builders have state that threads share; so have the streams."""
    streams = sys.stdout, sys.stderr
    models = [Moe() for _ in range(4)]
    results: list[bool | None] = [None] * len(models)

    def work(position: int) -> None:
        compiled = moec.compile(models[position], (x,))
        results[position] = close(compiled(x), models[position](x))

    threads = [threading.Thread(target=work, args=(position,)) for position in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * len(models)
    assert (sys.stdout, sys.stderr) == streams


def test_a_model_without_moe_says_so() -> None:
    dense = moec.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), (x,))
    assert dense.blocks == ()
    assert "No MoE block was recognised" in str(dense.report())


def test_several_outputs_come_as_the_module_returns_them(tmp_path: Path) -> None:
    """From an artifact they come by name."""
    model = moec.compile(Function(lambda x: {"a": x + 1, "b": (x * 2, x * 3)}), (x,))
    result = model(x)
    assert list(result) == ["a", "b"]
    assert close(result["b"][1], x * 3)
    model.save(tmp_path / "model.moec")
    named = moec.load(tmp_path / "model.moec")(x)
    assert list(named) == ["a", "b_0", "b_1"]
    assert close(named["b_1"], x * 3)


class Odd(nn.Module):
    """Two operators that no compiler of models has a rule for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x) + torch.linalg.svdvals(x).sum()


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Odd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(x) * 2


def test_unsupported_operators_are_all_listed_with_their_place() -> None:
    with pytest.raises(UnsupportedError) as raised:
        moec.compile(Holds(), (x,))
    words = str(raised.value)
    assert "special_bessel_j0" in words
    assert "linalg_svd" in words
    assert words.count("odd") >= 2


class Squared(nn.Module):
    """A loop over experts that weighs its rows with the other slot's weight, squared. `odd` has no
    kernel where it is not the identity."""

    odd = staticmethod(lambda weights: weights)

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            share = self.odd(weights[token, 1 - slot, None]) ** 2
            out.index_add_(0, token, expert(x[token]) * share)
        return out


class OddlyWeighted(Squared):
    odd = staticmethod(torch.special.bessel_j0)


class Greatest(Squared):
    """The greatest of what the experts of a token give, where a block has their sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out[token] = torch.maximum(out[token], expert(x[token]) * weights[token, slot, None])
        return out


def test_experts_that_are_not_recognised_compile_with_masks() -> None:
    model = Greatest().eval()
    compiled = moec.compile(model, (x,))
    assert compiled.blocks == ()
    assert any("aten.maximum.default joins rows with" in d.reason for d in compiled.declined)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_experts_that_cannot_be_compiled_say_why_they_were_not_recognised() -> None:
    with pytest.raises(UnsupportedError) as raised:
        moec.compile(OddlyWeighted(), (x,))
    first, rest = str(raised.value).split("\nexperts were not recognised, which would compile:\n")
    assert "aten.special_bessel_j0.default has no kernel (3 times" in first
    assert rest.startswith("  ")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"args": 5}, UsageError, "args is a int: give the example inputs as a tuple"),
        ({"args": x.numpy()}, UsageError, "args is a ndarray: give the example inputs as a tuple"),
        ({"args": (x.numpy(),)}, UsageError, "an example input is a numpy array: give torch ten"),
        ({"args": (), "kwargs": [x]}, UsageError, "kwargs is a list: give the example inputs by"),
        ({"args": ()}, UsageError, "Moe needs example inputs"),
        ({"opt_level": 7}, UsageError, "there is no optimisation level 7; levels are 0, 1 and 2"),
        ({"opt_level": "2"}, UsageError, "there is no optimisation level 2"),
        ({"passes": "+magic"}, UsageError, "write +name or -name, where name is one of "),
        ({"passes": "-fuse-gat"}, UsageError, "; did you mean 'fuse-gate'?"),
        ({"passes": 3}, UsageError, "passes is a int: give text such as"),
        ({"stop_after": "lunch"}, UsageError, "lunch: no such pass; there are capture, "),
        ({"target": "z80"}, TargetError, "unknown target 'z80'; the known targets are cpu"),
        ({"target": 3}, UsageError, "target is a int: give the name of a target"),
        ({"stop_after": 5}, UsageError, "stop_after is 5: give the name of a pass"),
        ({"dtype": "int8"}, UsageError, "dtype int8: models are float32, bfloat16, float16"),
        ({"dtype": torch.int64}, UsageError, "dtype torch.int64: models are float32, bfloat16"),
        ({"verify": "yes"}, UsageError, 'verify is \'yes\': give "off", "quick", "full" or the'),
        ({"verify": -1.0}, UsageError, 'verify is -1.0: give "off", "quick", "full" or the'),
        ({"verify": float("nan")}, UsageError, 'verify is nan: give "off", "quick", "full" or'),
        ({"dynamic_shapes": {"q": None}}, CaptureError, "dynamic_shapes names q, but the argum"),
    ],
)
def test_what_cannot_be_asked(
    model: Moe, options: dict[str, Any], kind: type[MoecError], words: str
) -> None:
    with pytest.raises(kind) as raised:
        moec.compile(model, **{"args": (x,), **options})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nothing_is_built_where_passes_stop(tmp_path: Path, model: Moe) -> None:
    calls: list[str] = []
    stopped = moec.compile(model, (x,), stop_after="canonicalise", progress=calls.append)
    assert (stopped.package, stopped.executor, stopped.checked) == (None, None, None)
    assert calls == ["capture", "passes"]
    assert list(stopped.phases) == calls
    for use in (lambda: stopped(x), lambda: stopped.save(tmp_path / "x.moec"), stopped.reset):
        with pytest.raises(UsageError, match="not built: leave out stop_after and build=False"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_dtype_converts_weights_and_float_inputs() -> None:
    converted = moec.compile(Moe(), (x,), dtype="bf16")
    assert converted(x.bfloat16()).dtype is torch.bfloat16


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 4))

    def forward(self, count: int, scaled: bool = True) -> torch.Tensor:
        return self.table[:count] * 2 if scaled else self.table


@pytest.mark.parametrize("args", [(3,), (8, False)])
def test_no_input_is_a_tensor(args: tuple[Any, ...]) -> None:
    """torch.export was told of shapes that no input has, and results were numpy arrays."""
    module = Table()
    model = moec.compile(module, args)
    assert torch.equal(model(*args), module(*args))
    with pytest.raises(InputError, match="argument count is"):
        model(5)


def test_a_pt2_without_examples(tmp_path: Path) -> None:
    exported = torch.export.export(Moe(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    exported._example_inputs = None
    path = tmp_path / "bare.pt2"
    torch.export.save(exported, path)
    with pytest.raises(UsageError, match=r"bare.pt2 has no example inputs to verify with"):
        moec.compile(path)
    bare = moec.compile(path, verify=False)
    assert close(bare(x), Moe()(x))
    bare.save(tmp_path / "bare.moec")
    assert artifact.read(tmp_path / "bare.moec").samples == ()
    assert moec.compile(path, (x,)).checked is not None
    with pytest.raises(CaptureError, match="sizes of an exported program are fixed"):
        moec.compile(path, (x,), dynamic_shapes={"x": None})


def test_code_for_another_machine(
    tmp_path: Path, model: Moe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without AVX2: the code is made and saved, never run."""
    monkeypatch.setattr(targets, "host_features", lambda: frozenset({"sse4.2"}))
    assert targets.missing(TARGETS["avx2"])
    with pytest.raises(UsageError, match="cannot be verified here: verify its graph and weights"):
        moec.compile(model, (x,), target="avx2")
    artifact = moec.compile(model, (x,), target="avx2", verify="quick")
    assert "verified    quick: the graph and the weights" in artifact.report().brief
    assert artifact.package is not None
    assert artifact.executor is None
    assert "which this machine cannot run: the code was not verified" in str(artifact.report())
    with pytest.raises(UsageError, match="cannot run code for avx2: save the model, and load it"):
        artifact(x)
    artifact.save(tmp_path / "far.moec")
    monkeypatch.undo()
    loaded = moec.load(tmp_path / "far.moec")
    assert loaded.artifact.samples == ()
    if not targets.missing(TARGETS["avx2"]):
        assert close(loaded(x), model(x))


def test_options_are_looked_at_before_anything_else() -> None:
    phases: list[str] = []
    with pytest.raises(UsageError, match="there is no option kep"):
        moec.compile("nowhere", passes="+prune-experts(kep=0.5)", progress=phases.append)
    assert not phases


def test_a_missing_linker_is_said_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link.shutil, "which", lambda name: None)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    phases: list[str] = []
    with pytest.raises(TargetError, match="no C compiler to link with"):
        moec.compile("nowhere", progress=phases.append)
    assert not phases
    assert moec.compile(Moe(), (x,), build=False).blocks
