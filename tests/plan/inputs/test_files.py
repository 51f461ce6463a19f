"""Clusters, models and plans as files: presets are correct, and errors name the fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from moec.errors import UsageError
from moec.plan.inputs.files import preset_names
from moec.plan.inputs.model import of_config, read_model
from moec.plan.inputs.workload import Workload
from moec.plan.network.cluster import read_cluster, with_nodes
from moec.plan.plan import LayerPlan, Plan, physical_to_logical, read_plan, write_plan


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 46.7), ("qwen3-30b-a3b", 30.5), ("deepseek-v3", 671.0), ("pr-moe-1t", 995.1)],
)
def test_models_have_as_many_parameters_as_published(name: str, billions: float) -> None:
    assert read_model(name).parameters / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize(
    ("name", "devices", "nodes"),
    [
        ("two-sockets", 2, 1),
        ("h100-8", 8, 1),
        ("superpod-32", 256, 32),
        ("superpod-128", 1024, 128),
        ("h800-40", 320, 40),
        ("cpu-8-nodes", 16, 8),
    ],
)
def test_clusters(name: str, devices: int, nodes: int) -> None:
    cluster = read_cluster(name)
    assert (cluster.devices, cluster.nodes) == (devices, nodes)
    assert {q.source for _, q in cluster.quantities()} <= {"measured", "data sheet", "assumed"}


def test_every_preset_is_tested() -> None:
    assert len(preset_names("clusters")) == 6
    assert len(preset_names("models")) == 4


def test_nodes_of_a_cluster() -> None:
    assert with_nodes(read_cluster("superpod-32"), 1250).devices == 10_000
    with pytest.raises(UsageError, match="no links between nodes"):
        with_nodes(read_cluster("h100-8"), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nlevels: []", "missing required field `device`"),
        ("nonsense: 1", "unknown field `nonsense`"),
        ("[", "while parsing"),
    ],
)
def test_faults_of_a_cluster_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        read_cluster(str(path))
    assert str(path) in str(error.value)


def test_a_name_that_is_no_preset() -> None:
    with pytest.raises(
        UsageError, match="b300 is neither a file nor a preset; presets are cpu-8-nodes"
    ):
        read_cluster("b300")


def test_more_choices_than_experts(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("name: m\nwidth: 8\nweights: bf16\nlayers: [{experts: 2, k: 3, hidden: 4}]")
    with pytest.raises(UsageError, match="3 of 2 experts per token is not possible"):
        read_model(str(path))
    layer = "{experts: 8, k: 3, hidden: 4, groups: 4, k_groups: 1}"
    path.write_text(f"name: m\nwidth: 8\nweights: bf16\nlayers: [{layer}]")
    with pytest.raises(UsageError, match="3 of 8 experts in 1 of 4 groups is not possible"):
        read_model(str(path))


def test_sizes_of_a_configuration() -> None:
    config = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "intermediate_size": 18432,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "vocab_size": 129280, "n_group": 8, "topk_group": 4,
        "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    model, preset = of_config(config, "config.json"), read_model("deepseek-v3")
    assert model.parameters == preset.parameters
    assert model.weights == "fp8"
    assert model.layers == tuple(replace(layer, repeat=1) for layer in preset.each_layer)


def test_a_configuration_that_lacks_a_size() -> None:
    with pytest.raises(UsageError, match=r"c\.json has none of num_hidden_layers"):
        of_config({"hidden_size": 8}, "c.json")


def plan(slots: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3))) -> Plan:
    layer = LayerPlan(layer=0, experts=4, attention=1, ranks=2, slots=slots, seconds={})
    return Plan(
        model="m", cluster="c", devices=2, node_size=2,
        workload=Workload(tokens=1, sequences=0, context=0), routing="", layers=(layer,),
        seconds=0.0, memory=0.0, memory_limit=0.0,
    )  # fmt: skip


def test_a_plan_in_a_notebook() -> None:
    shown = replace(plan(), model="<m>")._repr_html_()
    assert shown.startswith("<pre>&lt;m&gt; on c: 2 devices\n")
    assert "layers  attention  experts  exchange  slots" in shown
    assert shown.endswith("</pre>")


def test_a_plan_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(plan(), path)
    assert read_plan(path) == plan()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"devices": 2', '"devices": 3', "2 ranks x 1 slices x 1 copies are not 3 devices"),
        ('"version": 1', '"version": 2', "version"),
        ('"experts": 4', '"experts": 5', r"do not hold experts 0\.\.E-1"),
        ("{", "", "is not a plan"),
    ],
)
def test_plans_that_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(plan(), path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        read_plan(path)


def test_maps_of_other_engines() -> None:
    assert np.array_equal(physical_to_logical(plan()), [[0, 1, 2, 3]])
    with pytest.raises(UsageError, match="ranks with 2 and 3 slots; vLLM and SGLang need equal"):
        physical_to_logical(plan(((0, 1), (1, 2, 3))))
