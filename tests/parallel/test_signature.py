"""The folder of a plan's ranks is signed like an artifact, and each rank checks it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from moec.errors import ArtifactError
from moec.parallel.launch import launch
from moec.parallel.process import Job
from moec.parallel.store import load_rank, read_plan, text_files
from moec.parallel.worker import run_rank
from moec.plan.plan import show
from tests.command_line import invoke
from tests.runtime.artifact.test_signature import public_path, write_pair


@pytest.fixture
def folder(two_ranks: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_ranks, tmp_path / "m.ranks"))


def test_signed_verified_and_refused(folder: Path, tmp_path: Path) -> None:
    key = write_pair(tmp_path, "key")
    done = invoke("sign", str(folder), "--key", str(key))
    assert (done.exit_code, done.stdout) == (0, f"wrote {folder}.sig\n")
    words = ["verify", str(folder), "--signed-by", str(public_path(key))]
    done = invoke(*words)
    assert done.exit_code == 0
    assert f"is intact and signed with the key in {public_path(key)}: " in done.stdout
    assert done.stdout.endswith(", for 2 ranks\n")
    assert load_rank(folder, 1, signed_by=public_path(key)).code.graph.results

    manifest = folder / "ranks.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")  # as a forger's with other digests
    refused = f"{folder} is not signed with the key in {public_path(key)}: it was changed after"
    done = invoke(*words)
    assert done.exit_code == 1
    assert refused in done.stderr
    job = Job(folder, tmp_path / "in.npz", None, 60.0, 1, signed_by=public_path(key))
    for read in (
        lambda: load_rank(folder, 0, signed_by=public_path(key)),
        lambda: text_files(folder, public_path(key)),
        lambda: launch(job, 2, run_rank),
    ):
        with pytest.raises(ArtifactError) as caught:
            read()
        assert refused in str(caught.value)
    done = invoke("run", folder, "--nproc", "2", "--input", tmp_path / "in.npz", *words[2:])
    assert done.exit_code == 1
    assert refused in done.stderr


def test_inspect_shows_the_plan_and_the_ranks(folder: Path) -> None:
    result = invoke("inspect", str(folder))
    assert result.exit_code == 0, result.output
    plan, ranks = read_plan(folder)
    assert result.stdout.startswith(show(plan))
    last = [line.split(maxsplit=3) for line in result.stdout.splitlines()[-2:]]
    assert [words[0] for words in last] == ["0", "1"]
    assert all("main" in words[-1] for words in last)
    facts = json.loads(invoke("inspect", str(folder), "--json").stdout)
    assert facts["ranks"] == [json.loads(json.dumps(asdict(rank))) for rank in ranks]
    held = sum(f.stat().st_size for f in (folder / "weights").iterdir())
    assert 0 < max(rank.weights for rank in ranks) <= held <= sum(rank.weights for rank in ranks)
    result = invoke("inspect", str(folder), "--graph", "x.dot")
    assert f"--graph draws one model, and {folder} has the ranks of a plan" in result.stderr
    (folder / "plan.json").write_bytes(b"{}")
    result = invoke("inspect", str(folder))
    assert (result.exit_code, "was changed after it was written" in result.stderr) == (1, True)


def test_damage_is_not_signed(folder: Path, tmp_path: Path) -> None:
    part = min((folder / "weights").iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    for words in (["verify"], ["sign", "--key", str(write_pair(tmp_path, "key"))]):
        done = invoke(*words, str(folder))
        assert done.exit_code == 1
        assert f"weights/{part.name} was altered: its SHA-256 differs" in done.stderr
    assert not folder.with_name("m.ranks.sig").exists()
