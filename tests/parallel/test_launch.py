"""Ranks as processes over gloo: the numbers of one process, and failures that are explained."""

from __future__ import annotations

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
from moec.parallel.store import load_rank, save_ranks
from moec.parallel.worker import run_rank
from moec.passes.parallel.plan_parallelism import rank_programs
from tests.parallel import entries
from tests.passes.parallel.test_plan_parallelism import FORMS, D, model, plan

FOUR = {
    "flat": FORMS["flat"],
    "rail": FORMS["rail"],
    "hierarchical": FORMS["hierarchical"],
    "slices": FORMS["slices"],
}


def job_of(p, tmp_path: Path, timeout: float = 300.0) -> tuple[Job, torch.Tensor]:  # type: ignore[no-untyped-def]
    x = torch.randn(11, D, generator=torch.Generator().manual_seed(1))
    np.savez(tmp_path / "in.npz", x=x.numpy())
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
def test_a_rank_that_fails(entry, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    job, _ = job_of(FORMS["flat"], tmp_path, timeout=20.0)
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        launch(job, 4, entry)
    # Twenty seconds of patience beside the start of four processes on a busy machine.
    assert time.monotonic() - start < 180
    assert not (tmp_path / "out.npz").exists()


def test_a_wrong_number_of_ranks(tmp_path: Path) -> None:
    job, _ = job_of(FORMS["flat"], tmp_path)
    with pytest.raises(RankError, match="planned for 4 ranks, not 3"):
        launch(job, 3, run_rank)


def test_a_rank_reads_its_part_alone(tmp_path: Path) -> None:
    job, _ = job_of(FORMS["flat"], tmp_path)
    for name in ("rank.0.moec", "rank.0.safetensors"):
        (job.folder / name).unlink()
    loaded = load_rank(job.folder, 1)
    assert {"router", "x"} <= {v.name for v in loaded.program.graph.values()}
    with pytest.raises(ArtifactError, match=r"rank\.0\.moec"):
        load_rank(job.folder, 0)


@pytest.mark.parametrize("name", ["plan.json", "shared.safetensors", "rank.1.safetensors"])
def test_altered_files(name: str, tmp_path: Path) -> None:
    job, _ = job_of(FORMS["flat"], tmp_path)
    content = bytearray((job.folder / name).read_bytes())
    content[-1] ^= 1
    (job.folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} is altered"):
        load_rank(job.folder, 1)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    job_of(FORMS["flat"], tmp_path)
    with pytest.raises(MoecError, match="exists; --force replaces it"):
        job_of(FORMS["flat"], tmp_path)
