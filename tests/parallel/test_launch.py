"""Ranks as processes over gloo: the results of one process, and clear messages for failures."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.errors import ArtifactError, MoecError
from moec.interpret.evaluate import evaluate
from moec.parallel.launch import launch
from moec.parallel.process import Job
from moec.parallel.process_ranks import RankError
from moec.parallel.save import save_ranks
from moec.parallel.store import code_file, load_rank
from moec.parallel.worker import run_rank
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.runtime import manifest as manifests
from moec.runtime.package import MAIN
from tests.parallel import entries
from tests.passes.parallel.test_plan_parallelism import FORMS, D, model, plan

FOUR = {
    "flat": FORMS["flat"],
    "rail": FORMS["rail"],
    "hierarchical": FORMS["hierarchical"],
    "slices": FORMS["slices"],
}


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat") / "m.ranks"
    save_ranks(rank_programs(model(), FORMS["flat"]), FORMS["flat"], folder)
    return folder


@pytest.fixture
def copy(flat: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(flat, tmp_path / "m.ranks"))


def inputs(tmp_path: Path) -> torch.Tensor:
    x = torch.randn(11, D, generator=torch.Generator().manual_seed(1))
    np.savez(tmp_path / "in.npz", x=x.numpy())
    return x


def job_of(p, tmp_path: Path, timeout: float = 300.0) -> tuple[Job, torch.Tensor]:  # type: ignore[no-untyped-def]
    x = inputs(tmp_path)
    save_ranks(rank_programs(model(), p), p, tmp_path / "m.ranks")
    output = tmp_path / "out.npz"
    return Job(tmp_path / "m.ranks", tmp_path / "in.npz", output, timeout, 1), x


@pytest.mark.long
@pytest.mark.parametrize("form", ["two ranks", *FOUR])
def test_equal_to_one_process(form: str, tmp_path: Path) -> None:
    """4 ranks as 2 nodes of 2; within the rounding of products over other numbers of rows."""
    p = plan(2) if form == "two ranks" else FOUR[form]
    job, x = job_of(p, tmp_path)
    shapes = launch(job, p.devices, run_rank)
    (expected,) = evaluate(model().graph, [x], model().weights)
    assert shapes == {"z_2": [11, D]} or list(shapes.values()) == [[11, D]]
    with np.load(job.output) as file:
        (result,) = (file[name] for name in file)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (entries.killed, r"^rank 1 ended by signal SIGKILL before its work was done"),
        (
            entries.stopped,
            r"^rank 1 did not answer before.*layer mlp, dist\.all_to_all over ep\.4x1",
        ),
        (entries.hanging, r"^rank 1 did not answer.*another rank did not come in time"),
        (entries.leaving, r"^rank 1 ended before.*layer mlp, dist\.all_to_all.*another rank ended"),
        (entries.raising, "^rank 1: too little memory"),
    ],
    ids=["killed", "stopped", "hanging", "leaving", "raising"],
)
def test_a_rank_that_fails(entry, message: str, flat: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    inputs(tmp_path)
    job = Job(flat, tmp_path / "in.npz", tmp_path / "out.npz", 10.0, 1)
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        launch(job, 4, entry)
    # Ten seconds of patience beside the start of four processes on a busy machine.
    assert time.monotonic() - start < 180
    assert not (tmp_path / "out.npz").exists()


def test_a_wrong_number_of_ranks(flat: Path) -> None:
    with pytest.raises(RankError, match="planned for 4 ranks, not 3"):
        launch(Job(flat, None, None, 5.0, 1), 3, run_rank)


def test_a_rank_reads_its_part_alone(copy: Path) -> None:
    first, second = (load_rank(copy, rank).code.package.arrays for rank in range(2))
    assert np.array_equal(first["router"], second["router"])
    for path in (copy / "rank.0").iterdir():
        path.unlink()
    code = load_rank(copy, 1).code
    assert {"router", "x"} <= {v.name for v in code.graph.values()}
    with pytest.raises(ArtifactError, match=r"rank\.0"):
        load_rank(copy, 0)


def test_what_ranks_share_is_there_once(flat: Path) -> None:
    parts = [parts_of_arrays(flat, rank) for rank in range(4)]
    assert all(part["router"] == parts[0]["router"] for part in parts)
    files = {part for rank in parts for part in rank.values()}
    assert {str(path.relative_to(flat)) for path in flat.glob("weights/*")} == files
    assert len(files) < sum(map(len, parts))


def parts_of_arrays(folder: Path, rank: int) -> dict[str, str]:
    manifest = manifests.load((folder / code_file(rank, MAIN)).read_bytes())
    return {name: stored.part for name, stored in manifest.arrays.items()}


@pytest.mark.parametrize("name", ["plan.json", "rank.1/main.json", "rank.1/main.so", "weights"])
def test_altered_files(name: str, copy: Path) -> None:
    name = parts_of_arrays(copy, 1)["router"] if name == "weights" else name
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} (is|was) altered"):
        load_rank(copy, 1).code.package.arrays["router"]


def test_another_processor(monkeypatch: pytest.MonkeyPatch, flat: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    message = r"m\.ranks, rank 1: it was compiled for .*, and this machine is riscv64"
    with pytest.raises(ArtifactError, match=message):
        load_rank(flat, 1)


def test_an_existing_folder_is_left_alone(flat: Path) -> None:
    with pytest.raises(MoecError, match="exists; --force replaces it"):
        save_ranks(rank_programs(model(), FORMS["flat"]), FORMS["flat"], flat)
