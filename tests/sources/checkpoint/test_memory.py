"""A checkpoint that is larger than the memory allowed compiles to the same artifact."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import pytest
import torch

import moec
from moec.arguments import cast
from moec.capture.doors import open_source
from moec.errors import UsageError
from moec.sources.checkpoint import load
from moec.sources.checkpoint.tensors import Tensors
from moec.sources.memory import spool
from moec.sources.memory.memory import Bounded
from moec.sources.memory.paged import UnreadableWeight
from tests.sources.checkpoint import adapters, writers
from tests.sources.checkpoint.families import FAMILIES, model
from tests.sources.checkpoint.test_values import AWQ, FORMS
from tests.sources.memory.small import SMALL, count_weights_alone


@pytest.fixture(autouse=True)
def small(monkeypatch):
    count_weights_alone(monkeypatch)


def save(family: str, folder: Path, **changes) -> Path:
    model(family, **changes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_the_values_of_the_checkpoint(family, tmp_path):
    folder = save(family, tmp_path)
    expected = open_source(folder).model.state_dict()
    source = open_source(folder, memory=SMALL)
    assert isinstance(source.memory, Bounded)
    assert any(map(source.memory.paged.contains, source.model.parameters()))
    with source.memory.reading():
        for name, tensor in source.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8-blocks", "gptq-act-order"])
def test_formats_of_few_bits(form, tmp_path):
    quantization, writer = FORMS[form]
    folder = writers.write(model("qwen3_moe"), tmp_path, quantization, writer)
    expected = open_source(folder).model.state_dict()
    source = open_source(folder, memory=SMALL)
    with source.memory.reading():
        for name, tensor in source.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_tied_weights_stay_one(tmp_path):
    folder = save("mixtral", tmp_path, tie_word_embeddings=True)
    loaded = open_source(folder, memory=SMALL).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def weights_of(artifact: Path) -> dict[str, int]:
    """The checksums of the weights of an artifact."""
    with zipfile.ZipFile(artifact) as archive:
        members = {member.filename: member.CRC for member in archive.infolist()}
    return {name: crc for name, crc in members.items() if name.startswith("weights/")}


@pytest.mark.parametrize(
    ("family", "options"),
    [("mixtral", {}), ("deepseek_v3", {"quant": "int4:32"}), ("qwen3_moe", {"dtype": "float32"})],
    ids=lambda value: str(value),
)
def test_the_artifact_is_the_same(family, options, tmp_path, monkeypatch):
    """With all weights in the file, and with none there that are packed for no kernel."""
    folder = save(family, tmp_path / "checkpoint")
    moec.compile(folder, **options).save(tmp_path / "a.moec")
    for least, verify in ((0, True), (1 << 40, False)):
        monkeypatch.setattr(spool, "LEAST", least)
        compiled = moec.compile(folder, **options, memory=SMALL, verify=verify)
        compiled.save(tmp_path / "b.moec")
        assert weights_of(tmp_path / "a.moec") == weights_of(tmp_path / "b.moec")
        assert "(--memory)" in str(compiled.report().notes)


@pytest.mark.parametrize("numbers", [(1 << 18) - 2048, 1 << 18, 1 << 19])
def test_the_artifact_is_the_same_at_the_thresholds(numbers, tmp_path, monkeypatch):
    """A router of 2 bytes a number: it is read later as if it had 4, and in no file below 1 MiB."""
    for module in (load, spool):
        monkeypatch.setattr(module, "LEAST", 1 << 20)
    changes = {"hidden_size": 2048, "num_experts": numbers // 2048, "moe_intermediate_size": 4}
    options = {"verify": False, "kv_cache": False}
    folder = save("qwen3_moe", tmp_path / "checkpoint", num_hidden_layers=1, **changes)
    moec.compile(folder, **options).save(tmp_path / "a.moec")
    moec.compile(folder, **options, memory="2MiB").save(tmp_path / "b.moec")
    assert weights_of(tmp_path / "a.moec") == weights_of(tmp_path / "b.moec")


def test_weights_of_another_dtype_are_read_later_too(tmp_path):
    source = cast(open_source(save("mixtral", tmp_path), memory=SMALL), "float32")
    for parameter in source.model.parameters():
        assert parameter.dtype == torch.float32
        assert source.memory.paged.contains(parameter)


def test_codes_of_a_checkpoint_are_kept(tmp_path):
    folder = writers.write(model("mixtral"), tmp_path, AWQ, writers.awq())
    compiled = moec.compile(folder, memory=SMALL, kv_cache=False)
    assert "keep the codes of the checkpoint" in str(compiled.report())


def test_adapters_change_weights_that_are_read_later(tmp_path):
    folder, adapter = save("mixtral", tmp_path / "checkpoint"), tmp_path / "adapter"
    name = "model.layers.1.self_attn.q_proj"
    adapters.write(adapter, adapters.factors(name, 64, 64), target_modules=["q_proj"])
    expected = open_source(folder, adapters=[adapter]).model.state_dict()
    source = open_source(folder, adapters=[adapter], memory=SMALL)
    base = open_source(folder).model.state_dict()
    assert not torch.equal(expected[f"{name}.weight"], base[f"{name}.weight"])
    with source.memory.reading():
        for key, tensor in source.model.state_dict().items():
            assert torch.equal(tensor, expected[key]), key


def test_onnx_after_compilation(tmp_path):
    """Weights are read again when a method of the result needs them."""
    folder = save("mixtral", tmp_path / "checkpoint")
    compiled = moec.compile(folder, memory=SMALL, build=False, dtype="float32")
    compiled.export_onnx(tmp_path / "m.onnx", cache=False)


def test_a_weight_that_cannot_be_read_ends_the_compilation(tmp_path, monkeypatch):
    """Eager fails without it, which by itself would only mean that the model refuses an input."""
    source = open_source(save("mixtral", tmp_path), memory=SMALL)
    read, names = Tensors.read, []

    def fail_later(tensors, name):
        names.append(name)
        if len(names) > 5:
            raise OSError("the disk is gone")
        return read(tensors, name)

    def try_often() -> None:
        with source.memory.reading():
            for _ in range(3):
                with contextlib.suppress(Exception):
                    source.model(**source.kwargs)

    monkeypatch.setattr(Tensors, "read", fail_later)
    with pytest.raises(UnreadableWeight) as raised:
        try_often()
    assert str(raised.value) == "a weight of the checkpoint cannot be read: the disk is gone"


@pytest.mark.parametrize("memory", ["6 gigs", 0, -1, True, [], "1e3GiB", float("nan")])
def test_a_size_that_is_none_is_refused(memory, tmp_path):
    with pytest.raises(UsageError, match="give bytes, or a size with GiB, GB, MiB or MB, such as"):
        moec.compile(tmp_path, memory=memory)
