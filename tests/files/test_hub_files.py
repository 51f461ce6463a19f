"""Models of the hub, from a server on this machine: what is downloaded, what stays in the cache,
and the one sentence for each thing that can go wrong."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from moec.errors import UsageError
from moec.files import hub_files
from moec.model_path import kind_of_model, local_path
from tests.files.hub_server import Hub, Repository, commit, connected, files_of

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_moe/checkpoint"
NAME = "org/tiny-MoE_1.0"
TINY = files_of(CHECKPOINT)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def repository(files: Mapping[str, bytes], **options: str) -> Repository:
    return Repository({commit(1): files}, {"main": commit(1)}, **options)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with the tiny MoE, which huggingface_hub takes for the hub, and an empty cache."""
    files = {
        **TINY,
        "README.md": b"# tiny",
        "pytorch_model.bin": b"pickled",
        "modeling_tiny.py": b"raise SystemExit",
        "original/model.safetensors": b"another copy",
    }
    with connected(Hub({NAME: repository(files)}), tmp_path, monkeypatch) as server:
        yield server


def refusal(text: str, revision: str | None = None) -> str:
    with pytest.raises(UsageError) as raised:
        local_path(text, revision)
    message = str(raised.value)
    assert "\n" not in message
    return message


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_what_is_read_is_downloaded(hub: Hub) -> None:
    path = Path(local_path(NAME))
    assert kind_of_model(str(path)) == "checkpoint"
    assert hub_files.origin(path) == (NAME, commit(1))
    assert hub_files.short_name(path) == NAME
    assert hub_files.notes(path) == (f"{NAME} of the hub, commit {commit(1)}",)
    present = files_of(path)
    assert present.keys() == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    } & TINY.keys()  # fmt: skip
    assert all(content == TINY[name] for name, content in present.items())
    assert sorted(hub.downloads) == sorted(present)


def test_a_second_run_downloads_nothing(hub: Hub) -> None:
    first = local_path(NAME)
    hub.requests.clear()
    assert local_path(NAME) == first
    assert hub.downloads == []


def test_revisions(hub: Hub) -> None:
    repository = hub.repositories[NAME]
    config = json.loads(TINY["config.json"]) | {"router_jitter_noise": 0.5}
    repository.commits[commit(2)] = {**TINY, "config.json": json.dumps(config).encode()}
    repository.refs["v2"] = commit(2)
    for revision in ("v2", commit(2)):
        path = Path(local_path(NAME, revision))
        assert path.name == commit(2)
        assert json.loads((path / "config.json").read_bytes()) == config
    # the weights are those of the other revision, which were in the cache
    assert Path(local_path(NAME)).name == commit(1)
    assert hub.downloads.count(WEIGHTS) == 1
    words = refusal(NAME, "v3")
    assert words.startswith(f"{NAME} has no revision 'v3': give a branch, a tag or a commit of ")


def test_a_branch_that_moved(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline mode uses the commit that was downloaded last."""
    local_path(NAME)
    repository = hub.repositories[NAME]
    repository.commits[commit(2)] = TINY
    repository.refs["main"] = commit(2)
    assert Path(local_path(NAME)).name == commit(2)
    offline(monkeypatch)
    assert Path(local_path(NAME)).name == commit(2)


def test_a_branch_that_moves_meanwhile(hub: Hub) -> None:
    """All files are of one commit."""
    files = hub_files.find(NAME)
    repository = hub.repositories[NAME]
    repository.commits[commit(2)] = {**TINY, WEIGHTS: b"others"}
    repository.refs["main"] = commit(2)
    path = hub_files.download(files)
    assert path.name == commit(1)
    assert (path / WEIGHTS).read_bytes() == TINY[WEIGHTS]


def test_only_the_files_of_the_index(hub: Hub) -> None:
    """Repositories also have the weights in other layouts."""
    content = TINY
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files = {
        "config.json": content["config.json"],
        "model-1.safetensors": content[WEIGHTS],
        "model-2.safetensors": b"2",
        "consolidated.safetensors": b"all of it",
        INDEX: json.dumps(index).encode(),
    }
    hub.repositories["org/shards"] = repository(files)
    local_path("org/shards")
    assert sorted(hub.downloads) == sorted(files.keys() - {"consolidated.safetensors"})
    hub.repositories["org/less"] = repository(
        {name: files[name] for name in ("config.json", INDEX, "model-1.safetensors")}
    )
    assert refusal("org/less") == (
        "the file model-2.safetensors is needed, and org/less has none of this name: give another "
        "revision"
    )
    hub.repositories["org/odd"] = repository({**files, INDEX: b"[]"})
    assert refusal("org/odd") == f"{INDEX} of org/odd is damaged: give another revision"


def test_a_download_that_is_cut_goes_on_where_it_ended(hub: Hub) -> None:
    hub.cuts[WEIGHTS] = [1_050_000, 200_000]
    path = Path(local_path(NAME))
    assert (path / WEIGHTS).read_bytes() == TINY[WEIGHTS]
    ranges = [r for method, p, r in hub.requests if method == "GET" and p.endswith(WEIGHTS)]
    assert ranges == ["", "bytes=1050000-", "bytes=1250000-"]


def test_a_download_that_ends_early_is_resumed_by_the_next_run(hub: Hub) -> None:
    hub.cuts[WEIGHTS] = [0] * 20
    words = refusal(NAME)
    assert words.startswith(f"the download of {NAME} ended early (")
    assert words.endswith(
        "run the same command again, which resumes with the files that are missing"
    )
    hub.requests.clear()
    hub.cuts.clear()
    local_path(NAME)
    assert hub.downloads == [WEIGHTS]


def test_offline_the_cache_is_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    local_path(NAME)
    offline(monkeypatch)
    hub.requests.clear()
    for revision in (None, "main", commit(1)):
        assert Path(local_path(NAME, revision)).name == commit(1)
    assert refusal(NAME, "v2") == (
        f"{NAME} does not exist here, and the hub's cache does not hold it at v2: HF_HUB_OFFLINE "
        "is set, and only without it the model is downloaded"
    )
    assert refusal("org/other").startswith(
        "org/other does not exist here, and the hub's cache does"
    )
    Path(local_path(NAME), WEIGHTS).unlink()
    assert refusal(NAME).startswith(f"{NAME} is no model that moec can read")
    assert hub.requests == []


def test_offline_with_a_part_of_the_weights(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    files = {"config.json": b"{}", INDEX: json.dumps(index).encode()}
    files |= {"1.safetensors": b"1", "2.safetensors": b"2"}
    hub.repositories["org/shards"] = repository(files)
    Path(local_path("org/shards"), "2.safetensors").unlink()
    offline(monkeypatch)
    assert refusal("org/shards") == (
        "the file 2.safetensors is needed, and the hub's cache has none for org/shards: run the "
        "same command without HF_HUB_OFFLINE"
    )


def test_a_path_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINT, tmp_path / NAME)
    assert local_path(NAME) == NAME
    assert hub.requests == []
    assert refusal(NAME, "v1") == (
        f"{NAME} is no id of the hub, and only these have revisions: leave 'v1' out"
    )


def test_what_has_the_form_of_an_id() -> None:
    ids = ("org/name", NAME, "o/n:file.gguf", "o/n:Q4/file-00001-of-00002.gguf", "a.b/c--d")
    assert all(map(hub_files.is_id, ids))
    paths = (
        *("", "name", "./name", "../name", "/org/name", "a/b/c", "org/name/", "~/n", "org/n m"),
        *("org/x.gguf", "org/x.pt2", "org/x.moec", "org/x.py", "org/x.py:f", "org/name:f"),
    )
    assert not any(map(hub_files.is_id, paths))


def test_gguf(hub: Hub) -> None:
    files = {f"Q4/m-0000{i}-of-00003.gguf": b"GGUF" for i in (1, 2, 3)}
    hub.repositories["org/gguf"] = repository({"config.json": b"{}", "m-Q8.gguf": b"GGUF", **files})
    path = Path(local_path("org/gguf:m-Q8.gguf"))
    assert path.name == "m-Q8.gguf"
    assert hub_files.origin(path) == ("org/gguf", commit(1))
    assert hub.downloads == ["m-Q8.gguf"]
    path = Path(local_path("org/gguf:Q4/m-00001-of-00003.gguf"))
    assert sorted(p.name for p in path.parent.iterdir()) == [n.removeprefix("Q4/") for n in files]
    names = ", ".join((*sorted(files), "m-Q8.gguf"))
    assert refusal("org/gguf") == (
        "org/gguf holds GGUF files: name one of them, as in org/gguf:Q4/m-00001-of-00003.gguf (it "
        f"has {names})"
    )
    assert refusal("org/gguf:m-Q6.gguf") == (
        "org/gguf has no file m-Q6.gguf; did you mean 'm-Q8.gguf'?"
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            "org/x has no .safetensors but pytorch_model.bin, which is pickled: it could run any "
            "code, so moec does not read it; choose a revision or a copy with safetensors",
        ),
        (
            ["config.json"],
            "org/x is no model that moec can read: the repository has no .safetensors",
        ),
        (["README.md"], "org/x is no model that moec can read: the repository has no config.json"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "org/x is an adapter: give the model that it changes, and the adapter in a folder with "
            "--adapter",
        ),
    ],
)
def test_without_weights(files: list[str], words: str, hub: Hub) -> None:
    hub.repositories["org/x"] = repository(dict.fromkeys(files, b"{}"))
    assert refusal("org/x") == words
    assert hub.downloads == []


def test_what_does_not_exist(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"org/none exists neither here nor at {hub.url}; if the model is private, log in"
    assert refusal("org/none") == f"{words} (hf auth login) or set HF_TOKEN"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/nine").mkdir(parents=True)
    assert f"neither here nor at {hub.url}; did you mean 'org/nine'?" in refusal("org/none")
    assert refusal("org/no--ne") == (
        "org/no--ne does not exist, and cannot be the id of a model of the hub"
    )


def test_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].gate, hub.repositories[NAME].token = "GatedRepo", "hf_good"
    words = (
        f"{NAME} is gated: accept its terms at {hub.url}/{NAME}, then log in (hf auth login) or "
        "set HF_TOKEN, and run the same command again"
    )
    assert refusal(NAME) == words
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refusal(NAME) == words
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert Path(local_path(NAME)).name == commit(1)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "{url} refuses the token for {name}: log in again (hf auth login)"),
        (503, "{url} answers 503 for {name}: run the same command again later"),
    ],
)
def test_a_server_that_refuses(status: int, words: str, hub: Hub) -> None:
    hub.status = status
    assert refusal(NAME) == words.format(url=hub.url, name=NAME)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = refusal(NAME)
    assert words.startswith(
        f"{NAME} does not exist here, and http://127.0.0.1:9 cannot be reached ("
    )
    assert words.endswith("or set HF_HUB_OFFLINE=1 to use what the hub's cache has")


@pytest.mark.parametrize("down", ["no server", "503"])
def test_a_hub_that_is_down_and_a_model_in_the_cache(
    down: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = local_path(NAME)
    if down == "503":
        hub.status = 503
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match=f"the files of {NAME} are those of the hub's cache, at "):
        assert local_path(NAME) == path
    assert "cannot be reached" in refusal("org/other") or down == "503"
    hub.status = 403
    if down == "503":
        assert "refuses the token" in refusal(NAME)


def test_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 10_000_000))
    words = f"{NAME} needs 0.0 GB more in {tmp_path}/cache, and 0.0 GB are free: free some, or set"
    assert refusal(NAME) == f"{words} HF_HOME to a folder on another disk"
    assert hub.downloads == []
    monkeypatch.undo()


def test_a_disk_that_others_fill(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = hub_files.find(NAME)
    monkeypatch.setattr(hub_files, "fetch", full)
    words = f"{NAME} cannot be written to {tmp_path}/cache: the disk is full; free some space"
    with pytest.raises(UsageError, match=re.escape(words)):
        hub_files.download(files)


def test_progress(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """The share of all bytes, also of those of a file that is cut, for the command's display."""
    hub.cuts[WEIGHTS] = [1_000_000]
    caplog.set_level(logging.DEBUG, "moec")
    files = hub_files.find(NAME)
    assert files.size == sum(map(len, (TINY[name] for name in files.names)))
    hub_files.download(files, shares=True)
    records = [vars(record) for record in caplog.records if record.name.startswith("moec")]
    shares: list[float] = [record["share"] for record in records]
    assert records[-1]["detail"] == "7 of 7 MB"
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > len(files.names)


def test_a_blob_that_all_models_share(hub: Hub, tmp_path: Path) -> None:
    """huggingface_hub links the file of a model to a folder for all models."""
    path = Path(local_path(NAME))
    blob = (path / "tokenizer.json").resolve()
    shared = tmp_path / "cache/blobs/aa/bb"
    shared.parent.mkdir(parents=True)
    shutil.move(blob, shared)
    blob.symlink_to(shared)
    assert kind_of_model(str(path)) == "checkpoint"


def test_code_of_a_repository_is_refused(hub: Hub) -> None:
    config = json.loads(TINY["config.json"]) | {"auto_map": {"AutoModel": "modeling.M"}}
    files = {**TINY, "config.json": json.dumps(config).encode(), "modeling.py": b"1 / 0"}
    hub.repositories["org/code"] = repository(files)
    path = local_path("org/code")
    assert "modeling.py" not in hub.downloads
    with pytest.raises(UsageError, match=r"brings its own code \(auto_map\), which moec does not"):
        kind_of_model(path)
