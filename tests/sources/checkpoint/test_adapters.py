"""Adapters: each weight of the model is what PEFT's formulas make of it, rounded once, and what an
adapter does beyond them is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import moec
from moec.capture.doors import open_source
from moec.errors import CaptureError, MoecError, UsageError
from tests.sources.checkpoint import adapters, test_gguf, writers
from tests.sources.checkpoint.adapters import delta, dora, factors, stacked
from tests.sources.checkpoint.families import COMMON, model
from tests.sources.checkpoint.test_values import FORMS

E, D, H = 4, 64, 96
ATTENTION = "model.layers.0.self_attn"
EXPERTS = "model.layers.0.mlp.experts"
OLD = "model.layers.0.block_sparse_moe.experts"
"""The experts of mixtral in its checkpoint, and in versions of transformers before they were
stacked."""


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, in which each expert has weights of its own."""
    folder = tmp_path_factory.mktemp("mixtral")
    model("mixtral").save_pretrained(folder)
    assert f"{OLD}.0.w1.weight" in load_file(folder / "model.safetensors")
    return folder


def check(
    base: Path, folders: list[Path], expected: Mapping[str, Tensor], names: set[str] | None = None
) -> None:
    """The weights of the base with adapters are the expected ones, in float64, rounded once; all
    others are as they were."""
    before = open_source(base).model.state_dict()
    after = open_source(base, adapters=folders).model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name not in expected:
            assert torch.equal(after[name], tensor), name
            continue
        exact = expected[name]
        assert not torch.allclose(tensor.double(), exact, rtol=1e-3), name
        # rounding to nearest moves a number by at most half a unit in its last place: 2**-8 of it
        # in bfloat16, 2**-24 in float32, of which sums of 4 to 64 products round a few times more
        unit = 2.0**-8 * 1.001 if tensor.dtype == torch.bfloat16 else 2.0**-20
        assert ((after[name].double() - exact).abs() <= unit * exact.abs() + 2.0**-20).all(), name


def state(base: Path) -> dict[str, Tensor]:
    return {n: t.double() for n, t in open_source(base).model.state_dict().items()}


def test_linear_layers(mixtral: Path, tmp_path: Path) -> None:
    tensors = {
        **factors(f"{ATTENTION}.q_proj", D, D),
        **factors(f"{ATTENTION}.v_proj", D // 2, D, rank=2),
        **factors("model.layers.1.self_attn.o_proj", D, D),
    }
    folder = adapters.write(
        tmp_path / "a", tensors, rank_pattern={"v_proj": 2, "1.self_attn.*": 4},
        alpha_pattern={"layers.1.self_attn.o_proj": 3, "^model.layers.0.self_attn.v_proj": 5},
    )  # fmt: skip
    base = state(mixtral)
    expected = {
        f"{module}.weight": base[f"{module}.weight"] + delta(tensors, module, scale)
        for module, scale in (
            (f"{ATTENTION}.q_proj", 6 / 4),
            (f"{ATTENTION}.v_proj", 5 / 2),
            ("model.layers.1.self_attn.o_proj", 3 / 4),
        )
    }
    check(mixtral, [folder], expected)


def test_rank_stabilised(mixtral: Path, tmp_path: Path) -> None:
    """alpha / sqrt(r); factors in bfloat16 are multiplied in float32."""
    tensors = {n: t.bfloat16() for n, t in factors(f"{ATTENTION}.q_proj", D, D).items()}
    folder = adapters.write(tmp_path / "a", tensors, use_rslora=True)
    name = f"{ATTENTION}.q_proj.weight"
    exact = state(mixtral)[name] + delta(tensors, f"{ATTENTION}.q_proj", 6 / 4**0.5)
    check(mixtral, [folder], {name: exact})


def test_experts_that_were_modules(mixtral: Path, tmp_path: Path) -> None:
    """Two of the experts, in one of which w3 is as it was; the router had another name too."""
    sizes = {"w1": (H, D), "w2": (D, H), "w3": (H, D)}
    chosen = [(1, "w1"), (1, "w2"), (1, "w3"), (3, "w1"), (3, "w2")]
    tensors = {}
    for expert, part in chosen:
        tensors |= factors(f"{OLD}.{expert}.{part}", *sizes[part])
    tensors |= factors("model.layers.1.block_sparse_moe.gate", E, D)
    folder = adapters.write(tmp_path / "a", tensors, alpha_pattern={"3.w1": 2})
    base = state(mixtral)
    gate_up, down = base[f"{EXPERTS}.gate_up_proj"], base[f"{EXPERTS}.down_proj"]
    for expert, part in chosen:
        scale = 2 / 4 if (expert, part) == (3, "w1") else 6 / 4
        change = delta(tensors, f"{OLD}.{expert}.{part}", scale)
        rows = {"w1": gate_up[expert, :H], "w3": gate_up[expert, H:], "w2": down[expert]}[part]
        rows += change
    router = "model.layers.1.mlp.gate.weight"
    exact = base[router] + delta(tensors, "model.layers.1.block_sparse_moe.gate", 6 / 4)
    expected = {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.down_proj": down, router: exact}
    check(mixtral, [folder], expected)


def stacks(*modules: tuple[str, int, int], rank: int = 4) -> dict[str, Tensor]:
    tensors = {}
    for module, out, inner in modules:
        tensors[f"{module}.lora_A.weight"] = torch.randn(E * rank, inner) / inner**0.5
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank * E)
    return tensors


def test_stacked_experts(mixtral: Path, tmp_path: Path) -> None:
    """PEFT wraps a module once for each of its parameters: the first one is the innermost."""
    inner, outer = f"{EXPERTS}.base_layer", EXPERTS
    tensors = stacks((inner, 2 * H, D)) | stacks((outer, D, H), rank=2)
    folder = adapters.write(
        tmp_path / "a", tensors, target_modules=[], rank_pattern={"experts.down_proj": 2},
        alpha_pattern={r".*\.gate_up_proj": 3},
        target_parameters=["experts.down_proj", "mlp.experts.gate_up_proj"],
    )  # fmt: skip
    base = state(mixtral)
    gate_up = base[f"{EXPERTS}.gate_up_proj"] + stacked(tensors, inner, E, 3 / 4)
    down = base[f"{EXPERTS}.down_proj"] + stacked(tensors, outer, E, 6 / 2)
    check(mixtral, [folder], {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.down_proj": down})


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_one_stack(part: str, mixtral: Path, tmp_path: Path) -> None:
    sizes = {"gate_up_proj": (2 * H, D), "down_proj": (D, H)}[part]
    tensors = stacks((EXPERTS, *sizes))
    folder = adapters.write(tmp_path / "a", tensors, target_parameters=[f"experts.{part}"])
    name = f"{EXPERTS}.{part}"
    check(mixtral, [folder], {name: state(mixtral)[name] + stacked(tensors, EXPERTS, E, 6 / 4)})


def test_stacks_that_are_stored_across(tmp_path: Path) -> None:
    """gpt-oss multiplies rows with [E, in, out]."""
    model("gpt_oss").float().save_pretrained(tmp_path / "base")
    inner, outer = f"{EXPERTS}.base_layer", EXPERTS
    tensors = stacks((inner, 2 * H, D), (outer, D, H))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    folder = adapters.write(tmp_path / "a", tensors, target_parameters=names)
    base = state(tmp_path / "base")
    gate_up = base[f"{EXPERTS}.gate_up_proj"] + stacked(tensors, inner, E, 6 / 4).mT
    down = base[f"{EXPERTS}.down_proj"] + stacked(tensors, outer, E, 6 / 4).mT
    expected = {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.down_proj": down}
    check(tmp_path / "base", [folder], expected)


def test_magnitudes(mixtral: Path, tmp_path: Path) -> None:
    """DoRA, of a layer and of one expert."""
    tensors = factors(f"{ATTENTION}.k_proj", D // 2, D, dora=True)
    tensors |= factors(f"{OLD}.2.w3", H, D, dora=True)
    folder = adapters.write(tmp_path / "a", tensors, use_dora=True)
    base = state(mixtral)
    name = f"{ATTENTION}.k_proj"
    weight, magnitude = base[f"{name}.weight"], tensors[f"{name}.lora_magnitude_vector"]
    linear = dora(weight, weight, delta(tensors, name, 6 / 4), magnitude)
    gate_up = base[f"{EXPERTS}.gate_up_proj"]
    rows, name = gate_up[2, H:], f"{OLD}.2.w3"
    magnitude = tensors[f"{name}.lora_magnitude_vector"]
    rows[:] = dora(rows, rows, delta(tensors, name, 6 / 4), magnitude)
    expected = {f"{ATTENTION}.k_proj.weight": linear, f"{EXPERTS}.gate_up_proj": gate_up}
    check(mixtral, [folder], expected)


def test_adapters_in_order(mixtral: Path, tmp_path: Path) -> None:
    """The norm of DoRA is that of the base with its own change, as PEFT has it."""
    name = f"{ATTENTION}.q_proj"
    first, second = factors(name, D, D), factors(name, D, D, dora=True)
    folders = [
        adapters.write(tmp_path / "a", first),
        adapters.write(tmp_path / "b", second, use_dora=True),
    ]
    base = state(mixtral)[f"{name}.weight"]
    magnitude, change = second[f"{name}.lora_magnitude_vector"], delta(second, name, 6 / 4)
    one = base + delta(first, name, 6 / 4)
    check(mixtral, folders, {f"{name}.weight": dora(one, base, change, magnitude)})
    two = dora(base, base, change, magnitude) + delta(first, name, 6 / 4)
    check(mixtral, folders[::-1], {f"{name}.weight": two})


def test_adapters_of_two_versions_of_transformers(mixtral: Path, tmp_path: Path) -> None:
    """The same experts as modules and as a stack: the sum is rounded once."""
    old, new = factors(f"{OLD}.0.w2", D, H), stacks((EXPERTS, D, H))
    folders = [
        adapters.write(tmp_path / "a", new, target_parameters=["experts.down_proj"]),
        adapters.write(tmp_path / "b", old),
    ]
    exact = state(mixtral)[f"{EXPERTS}.down_proj"] + stacked(new, EXPERTS, E, 6 / 4)
    exact[0] += delta(old, f"{OLD}.0.w2", 6 / 4)
    check(mixtral, folders, {f"{EXPERTS}.down_proj": exact})


def test_modules_that_are_replaced(mixtral: Path, tmp_path: Path) -> None:
    head, norm = torch.randn(96, D), torch.rand(D)
    tensors = {"lm_head.weight": head, "model.norm.weight": norm}
    folder = adapters.write(
        tmp_path / "a", tensors | factors(f"{ATTENTION}.q_proj", D, D),
        modules_to_save=["lm_head", "norm"],
    )  # fmt: skip
    name = f"{ATTENTION}.q_proj.weight"
    query = open_source(mixtral, adapters=[folder]).model.state_dict()[name].double()
    expected = {"lm_head.weight": head.double(), "model.norm.weight": norm.double(), name: query}
    check(mixtral, [folder], expected)


def test_biases(tmp_path: Path) -> None:
    """Trained ones replace those of the base; lora_bias is added to them with the scale."""
    config = AutoConfig.for_model("qwen2", **COMMON | {"num_hidden_layers": 1})
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    bias = torch.randn(D)
    query, value = f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj"
    tensors = {
        **factors(query, D, D), **factors(value, D // 2, D),
        f"{query}.base_layer.bias": bias, f"{value}.lora_B.bias": bias[: D // 2],
    }  # fmt: skip
    folder = adapters.write(tmp_path / "a", tensors, bias="lora_only", lora_bias=True)
    before = state(base)
    expected = {
        f"{query}.weight": before[f"{query}.weight"] + delta(tensors, query, 6 / 4),
        f"{value}.weight": before[f"{value}.weight"] + delta(tensors, value, 6 / 4),
        f"{query}.bias": bias.double(),
        f"{value}.bias": before[f"{value}.bias"] + 6 / 4 * bias[: D // 2].double(),
    }
    check(base, [folder], expected)


@pytest.mark.parametrize("magnitudes", [False, True], ids=["lora", "dora"])
def test_weights_of_inputs_by_outputs(magnitudes: bool, tmp_path: Path) -> None:
    """gpt2 multiplies rows with [in, out] (fan_in_fan_out), and so do embeddings; the head has the
    weight of the embedding, and keeps that of the base."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=16,
                                  vocab_size=50)  # fmt: skip
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    layer, table = "transformer.h.0.attn.c_attn", "transformer.wte"
    tensors = factors(layer, 96, 32, dora=magnitudes)
    embedding = factors(table, 32, 50, dora=magnitudes)
    renamed = {
        n.replace("lora_A.weight", "lora_embedding_A").replace(
            "lora_B.weight", "lora_embedding_B"
        ): t
        for n, t in embedding.items()
    }
    folder = adapters.write(
        tmp_path / "a", tensors | renamed, fan_in_fan_out=True, use_dora=magnitudes
    )
    before = state(base)
    expected = {}
    for name, factors_of in ((layer, tensors), (table, embedding)):
        weight, change = before[f"{name}.weight"].mT, delta(factors_of, name, 6 / 4)
        magnitude = factors_of.get(f"{name}.lora_magnitude_vector")
        exact = weight + change if magnitude is None else dora(weight, weight, change, magnitude)
        expected[f"{name}.weight"] = exact.mT
    check(base, [folder], expected)


def test_an_embedding_that_is_replaced_and_adapted(mixtral: Path, tmp_path: Path) -> None:
    """PEFT saves embeddings that it adapts with the layer below (save_embedding_layers)."""
    table = torch.randn(96, D)
    tensors = factors("model.embed_tokens", D, 96)
    a, b = (tensors[f"model.embed_tokens.lora_{x}.weight"] for x in "AB")
    stored = {
        "model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b,
        "model.embed_tokens.base_layer.weight": table,
    }  # fmt: skip
    folder = adapters.write(tmp_path / "a", stored)
    exact = table.double() + delta(tensors, "model.embed_tokens", 6 / 4).mT
    check(mixtral, [folder], {"model.embed_tokens.weight": exact})


def test_codes_of_other_weights_stay(tmp_path: Path) -> None:
    """A weight that changed is stored in the model's dtype, and the report counts them."""
    base = writers.write(model("mixtral"), tmp_path, *FORMS["gptq"])
    tensors = factors(f"{OLD}.2.w2", D, H) | factors(f"{ATTENTION}.q_proj", D, D)
    folder = adapters.write(tmp_path / "a", tensors)
    before, source = open_source(base), open_source(base, adapters=[folder])
    assert before.codes is not None
    assert source.codes is not None
    changed = {f"{EXPERTS}.down_proj", f"{ATTENTION}.q_proj.weight"}
    assert source.codes().stored.keys() == before.codes().stored.keys() - changed
    assert source.notes == (
        "adapter a: 2 weights changed",
        "of these, 2 lose the codes of the checkpoint, and are stored as bfloat16",
    )
    exact = state(base)
    down = exact[f"{EXPERTS}.down_proj"]
    down[2] = writers_values(tmp_path, f"{OLD}.2.w2.weight") + delta(tensors, f"{OLD}.2.w2", 6 / 4)
    query = f"{ATTENTION}.q_proj"
    exact[f"{query}.weight"] += delta(tensors, query, 6 / 4)
    check(base, [folder], {name: exact[name] for name in changed})


def writers_values(folder: Path, name: str) -> Tensor:
    """The values of a quantised weight in float32, which are rounded only with their change."""
    return load_file(folder / "plain/model.safetensors")[name].double()


def test_rounded_weights_of_a_stack_that_changed(tmp_path: Path) -> None:
    """Formats without kernels are rounded to int8, but not the merged experts."""
    base = writers.write(model("mixtral"), tmp_path, *FORMS["fp8-e5m2"])
    folder = adapters.write(tmp_path / "a", factors(f"{OLD}.2.w2", D, H))
    codes = open_source(base, adapters=[folder]).codes
    assert codes is not None
    assert f"{EXPERTS}.down_proj" not in codes().nearest
    assert f"{EXPERTS}.gate_up_proj" in codes().nearest


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    test_gguf.write(path, "qwen3_moe", "BF16")
    weight = open_source(path).model.state_dict()[f"{ATTENTION}.q_proj.weight"]
    tensors = factors(f"{ATTENTION}.q_proj", *weight.shape)
    folder = adapters.write(tmp_path / "a", tensors)
    name = f"{ATTENTION}.q_proj"
    check(path, [folder], {f"{name}.weight": weight.double() + delta(tensors, name, 6 / 4)})


def test_the_compiled_model(mixtral: Path, tmp_path: Path) -> None:
    """It computes what eager computes with the merged weights, and the report names the adapter."""
    folder = adapters.write(tmp_path / "tuned", factors(f"{OLD}.1.w1", H, D))
    compiled = moec.compile(mixtral, adapters=[folder], target="null", verify=False)
    assert "adapter tuned: 1 weight changed" in compiled.report().notes
    assert str(tmp_path) not in json.dumps(compiled.report().to_dict())


def refusal(base: Path, folder: Path, kind: type[MoecError]) -> str:
    with pytest.raises(kind) as raised:
        open_source(base, adapters=[folder])
    message = str(raised.value)
    assert "\n" not in message
    return message


FIELDS = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3', and moec merges LORA only"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is [[0, 2], [1, 2]], which moec"),
    (
        {"alora_invocation_tokens": [1]},
        "alora_invocation_tokens is [1], which moec does not honour",
    ),
    ({"trainable_token_indices": [5]}, "trainable_token_indices is [5], which moec does not"),
    ({"use_qalora": True}, "use_qalora is true, which moec does not honour: merge the adapter"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying is true, which moec does not honour"),
    ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow is 1, which moec does not honour"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', with which training changed"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', with which training changed"),
]


@pytest.mark.parametrize(("fields", "words"), FIELDS)
def test_what_is_not_honoured(
    fields: dict[str, Any], words: str, mixtral: Path, tmp_path: Path
) -> None:
    folder = adapters.write(tmp_path / "a", factors(f"{ATTENTION}.q_proj", D, D), **fields)
    assert words in refusal(mixtral, folder, UsageError)


MALFORMED = [
    ({"r": 0}, "Expected `int` >= 1 - at `$.r`"),
    ({"r": "4"}, "Expected `int`, got `str` - at `$.r`"),
    ({"lora_alpha": "x"}, "Expected `float`, got `str` - at `$.lora_alpha`"),
    ({"rank_pattern": {"(": 4}}, "missing ), unterminated subpattern"),
    ({"rank_pattern": [4]}, "Expected `object | null`, got `array` - at `$.rank_pattern`"),
    ({"alpha_pattern": {"a": None}}, "Expected `float`, got `null` - at `$.alpha_pattern[...]`"),
    ({"use_dora": 1}, "Expected `bool`, got `int` - at `$.use_dora`"),
]


@pytest.mark.parametrize(("fields", "words"), MALFORMED)
def test_malformed_configurations(
    fields: dict[str, Any], words: str, mixtral: Path, tmp_path: Path
) -> None:
    folder = adapters.write(tmp_path / "a", factors(f"{ATTENTION}.q_proj", D, D), **fields)
    message = refusal(mixtral, folder, CaptureError)
    assert f"adapter_config.json is malformed: {words}" in message
    assert message.endswith("copy it again from the source of the adapter")


Q = f"{ATTENTION}.q_proj"
TENSORS = [
    (factors(f"{ATTENTION}.x_proj", D, D), {}, f"changes {ATTENTION}.x_proj.weight, which the"),
    (factors(f"{OLD}.4.w1", H, D), {}, f"changes {OLD}.4.w1.weight, which the model does not have"),
    (factors(Q, D + 1, D), {}, f"changes {Q}.weight as [65, 64], and the model's is [64, 64]"),
    (factors(f"{OLD}.0.w1", D, H), {}, f"changes {OLD}.0.w1.weight as [64, 96], and the"),
    (factors(Q, D, D, rank=3), {}, f"has tensors [3, 64], [64, 3] for {Q}, no factors of rank 4"),
    ({f"{Q}.lora_A.weight": torch.ones(4, D)}, {}, f"lacks lora_B of {Q}, and use_dora is false"),
    (factors(Q, D, D), {"use_dora": True}, f"lacks lora_magnitude_vector of {Q}, and use_dora is"),
    (
        factors(Q, D, D) | {f"{Q}.lora_magnitude_vector": torch.ones(3)}, {"use_dora": True},
        f"has tensors [4, 64], [64, 4], [3] for {Q}, no factors of rank 4",
    ),
    (
        stacks((EXPERTS, D, H)) | {f"{EXPERTS}.lora_magnitude_vector": torch.ones(D)},
        {"use_dora": True, "target_parameters": ["experts.down_proj"]},
        f"has tensors [16, 96], [64, 16], [64] for {EXPERTS}, no factors of rank 4",
    ),
    (factors(Q, D, D, dora=True), {}, f"has lora_magnitude_vector of {Q}, and use_dora is false"),
    (stacks((EXPERTS, D, H)), {}, f"changes {EXPERTS}.weight, which the model does not have"),
    (
        stacks((f"{EXPERTS}.base_layer", D, H)), {"target_parameters": ["experts.down_proj"]},
        f"has tensors of {EXPERTS}.base_layer, and target_parameters names 1 parameters of "
    ),
    (
        stacks((EXPERTS, H, D)), {"target_parameters": ["experts.down_proj"]},
        f"changes {EXPERTS}.down_proj as [4, 96, 64], and the model's is [4, 64, 96]",
    ),
    ({"lm_head.weight": torch.ones(97, D)}, {}, "changes lm_head.weight as [97, 64], and the"),
    ({"score.weight": torch.ones(2, D)}, {}, "changes score.weight, which the model does not have"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "fields", "words"), TENSORS)
def test_what_fits_no_weight(
    tensors: dict[str, Tensor], fields: dict[str, Any], words: str, mixtral: Path, tmp_path: Path
) -> None:
    folder = adapters.write(tmp_path / "a", tensors, **fields)
    assert words in refusal(mixtral, folder, CaptureError)


def test_two_adapters_that_replace_one_weight(mixtral: Path, tmp_path: Path) -> None:
    folders = [
        adapters.write(tmp_path / name, {"lm_head.weight": torch.ones(96, D)}) for name in "ab"
    ]
    with pytest.raises(CaptureError, match=r"b replaces lm_head.weight, which another adapter ch"):
        open_source(mixtral, adapters=folders)


def test_folders_that_are_no_adapters(mixtral: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    words = f"the adapter {folder} is no folder"
    assert words in refusal(mixtral, folder, UsageError)
    folder.mkdir()
    assert refusal(mixtral, folder, UsageError) == (
        f"{folder} is no adapter of PEFT: it has no adapter_config.json"
    )
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    assert refusal(mixtral, folder, UsageError) == (
        f"{folder} has no adapter_model.safetensors but adapter_model.bin, which is pickled: save "
        "it again with PEFT"
    )
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "peft_type is None, and moec merges LORA only" in refusal(mixtral, folder, UsageError)
    (folder / "adapter_config.json").write_text("[")
    assert "adapter_config.json is not JSON" in refusal(mixtral, folder, CaptureError)
    (folder / "adapter_config.json").write_text(json.dumps(adapters.CONFIG))
    assert "adapter_model.safetensors is truncated or damaged" in refusal(
        mixtral, folder, CaptureError
    )


def test_an_adapter_in_place_of_the_model(mixtral: Path, tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a", factors(Q, D, D))
    with pytest.raises(UsageError) as raised:
        open_source(folder)
    assert str(raised.value) == (
        f"{folder} is an adapter: give the model, org/base --adapter {folder}"
    )
    beside = Path(shutil.copytree(mixtral, tmp_path / "beside"))
    shutil.copy(folder / "adapter_config.json", beside)
    with pytest.raises(UsageError) as raised:
        open_source(beside)
    assert str(raised.value) == (
        f"{beside} has an adapter (adapter_config.json) and a model: move the adapter's two files "
        "into another folder, and give that with --adapter to merge it"
    )


def test_models_that_are_no_checkpoints(tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a", factors(Q, D, D))
    with pytest.raises(
        UsageError, match="adapters are merged into checkpoints and GGUF files: give"
    ):
        moec.compile(torch.nn.Linear(2, 2), (torch.ones(1, 2),), adapters=[folder])
    with pytest.raises(UsageError, match=r"adapters is 'a': give a list of folders"):
        moec.compile(str(tmp_path), adapters="a")  # type: ignore[arg-type]
