"""Recorded routing: its file, the formats of other tools, and its display."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.errors import InputError
from moec.plan.inputs.importers import of_trace, read_routing
from moec.plan.placement.balance import balance
from moec.plan.placement.coactivation import coactivation
from moec.runtime.call.routing_trace import load_trace, of_ids, save_trace

IDS = np.array([[[0, 1], [2, 3]], [[1, 0], [2, 0]], [[0, 1], [2, 1]], [[3, -1], [2, 3]]])


def test_a_trace_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    save_trace(of_ids(IDS, 4), path)
    trace = load_trace(path)
    assert np.array_equal(trace.ids, IDS)
    assert [count.tolist() for count in trace.counts()] == [[3, 3, 0, 1], [1, 1, 4, 2]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS + 9}, "above the last one of its layer"),
        ({"ids": IDS[0]}, r"ids are \[2, 2\], not \[T, L, K\]"),
        ({"step": np.zeros(3, int)}, "ids are of 4 tokens"),
        ({"experts": np.ones(5, int)}, "ids are of 2 layers"),
        ({"ids": IDS.astype(float)}, "ids is float64, not of integers"),
        ({"ids": None}, "lacks ids"),
        ({"ids": np.array([None])}, r"it is no \.npz archive of arrays of numbers"),
    ],
)
def test_files_that_are_no_trace(change: dict, message: str, tmp_path: Path) -> None:
    trace = of_ids(IDS, 4)
    arrays = {**vars(trace), **change}
    path = tmp_path / "t.npz"
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    with pytest.raises(InputError, match=message):
        load_trace(path)


def sglang(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "dump.pt"
    torch.save(content, path)
    return path


def test_counts_of_sglang(tmp_path: Path) -> None:
    counts = torch.arange(12).reshape(2, 2, 3)
    routing = read_routing(sglang(tmp_path, {"rank": 0, "logical_count": counts}))
    assert np.array_equal(routing.counts, counts.sum(0).numpy())
    assert routing.trace is None


def test_slots_of_sglang(tmp_path: Path) -> None:
    record = {"forward_pass_id": 0, "global_physical_count": torch.tensor([[5, 1, 2, 3]])}
    table = torch.tensor([[0, 1, 2, 0]])
    content = {"records": [record, record], "last_physical_to_logical_map": table}
    routing = read_routing(sglang(tmp_path, content))
    assert [count.tolist() for count in routing.counts] == [[16, 2, 4]]


def test_tokens_of_sglang(tmp_path: Path) -> None:
    ids = torch.tensor(IDS).permute(1, 0, 2)
    record = {"input_ids": torch.zeros(4), "topk_ids_of_layer": ids}
    routing = read_routing(sglang(tmp_path, {"records": [record]}))
    assert routing.trace is not None
    assert np.array_equal(routing.trace.ids, IDS)


def test_counts_of_moe_infinity_and_eplb(tmp_path: Path) -> None:
    counts = np.arange(12.0).reshape(2, 2, 3)
    np.save(tmp_path / "a.npy", counts)
    (tmp_path / "b.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    for name in ("a.npy", "b.json"):
        assert np.array_equal(read_routing(tmp_path / name).counts, counts.sum(0))


def test_records_a_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = [
        {"layer_idx": layer, "token_idx": token, "selected_ids": IDS[token, layer].tolist()}
        for token in range(3)
        for layer in range(2)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    trace = read_routing(path).trace
    assert trace is not None
    assert np.array_equal(trace.ids, IDS[:3])
    path.write_text("\n".join(map(json.dumps, records[1:])))
    with pytest.raises(InputError, match="not every token"):
        read_routing(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "has no logical_count"),
        ("a.json", "[[-1, 2]]", "negative"),
        ("a.jsonl", "{}", "line 1: no layer_idx"),
        ("a.pt", "no", "is not a dump of SGLang"),
        ("a.txt", "", "routing is read from"),
        ("a.npy", "no", r"a\.npy is not an array of numbers that numpy wrote"),
        ("a.npz", "no", r"it is no \.npz archive of arrays of numbers"),
        ("a.json", "[[0, 0]]", "no expert was chosen"),
        ("a.jsonl", "", "has no record"),
        ("a.pt", "hello", "is not a dump of SGLang's recorder"),
    ],
)
def test_other_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_routing(path)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([5], "records without global_physical_count"),
        ([torch.ones(1)], "records without global_physical_count"),
        ([{"topk_ids_of_layer": torch.zeros(2)}], "must be .layers, tokens, k"),
        ([{"topk_ids_of_layer": torch.zeros(n, 3, 2)} for n in (1, 2)], "must be .layers, tokens"),
        ([{"topk_ids_of_layer": torch.zeros(2, 3, 2)}], "float32, not integers .T, L, K"),
    ],
)
def test_records_of_sglang_that_are_none(records: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_routing(sglang(tmp_path, {"records": records}))


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "t.npy").mkdir()
    with pytest.raises(InputError, match=r"t\.npy is a folder"):
        read_routing(tmp_path / "t.npy")


def test_balance() -> None:
    first, second = balance(of_trace(of_ids(IDS, 4), "test"))
    assert first.busiest == pytest.approx(3 / 7 * 4)
    assert (first.unused, second.unused) == (1, 0)
    assert first.pair == (0, 1)
    # First half 0, 1 twice each; second half 0, 1, 3 once each.
    assert first.drift == pytest.approx((1 / 6 + 1 / 6 + 1 / 3) / 2)


def test_coactivation() -> None:
    meets = coactivation(of_ids(IDS, 4), 0)
    assert meets.tolist() == [[3, 3, 0, 0], [3, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
