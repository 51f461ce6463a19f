"""Ranks as processes over gloo: the results of one process, and clear messages for failures."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.errors import ArtifactError, MoecError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.parallel.build import save_ranks
from moec.parallel.launch import launch
from moec.parallel.process import Job
from moec.parallel.process_ranks import RankError
from moec.parallel.segments import RankModel
from moec.parallel.store import code_file, load_rank
from moec.parallel.worker import run_rank
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.runtime.artifact import manifest as manifests
from moec.runtime.package import MAIN
from tests.once import Once
from tests.parallel import entries
from tests.parallel.conftest import SOON
from tests.passes.parallel.test_plan_parallelism import FORMS, MODEL, D, layer, plan
from tests.passes.parallel.test_plan_parallelism import model as model_of_graph

WHERE = r"layer mlp, dist\.all_to_all over ep\.4x1"
WAITING = f"before its work was done; rank [023], {WHERE}: another rank"
FOUR = {
    "flat": FORMS["flat"],
    "rail": FORMS["rail"],  # with copies of experts, so that ranks have different numbers
    "hierarchical": FORMS["hierarchical"],
    "deduplicated": plan(4, form="deduplicated"),
    "slices": FORMS["slices"],
}
WIDTH = 48
COUNTS = 4 * 4  # bytes: each rank sends one count to the other node


def model(seed: int = 0) -> Program:
    """Half of the experts for each token, so that most tokens have several on each node."""
    return model_of_graph(seed, layer(4, WIDTH))


def fill(path: Path) -> None:
    """The ranks of every form."""
    for name, planned in FOUR.items():
        save_ranks(rank_programs(model(), planned), planned, path / f"{name}.ranks")


@pytest.fixture(scope="session")
def saved(once: Once) -> Path:
    return once("forms", fill)


@pytest.fixture(scope="session")
def flat(saved: Path) -> Path:
    return saved / "flat.ranks"


@pytest.fixture
def copy(flat: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(flat, tmp_path / "m.ranks"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def inputs(tmp_path: Path, width: int = WIDTH) -> torch.Tensor:
    x = torch.randn(11, width, generator=torch.Generator().manual_seed(1))
    np.savez(tmp_path / "in.npz", x=x.numpy())
    return x


def test_equal_to_one_process(
    saved: Path, flat: Path, tmp_path: Path, temporary_files: Path
) -> None:
    """Every form of exchange, by 4 ranks as 2 nodes of 2; within the rounding of products over
    other numbers of rows."""
    x = inputs(tmp_path)
    job = Job(flat, tmp_path / "in.npz", None, 300.0, 1)
    results = launch(job, 4, entries.forms)
    (expected,) = evaluate(model().graph, [x], model().weights)
    assert results.keys() == FOUR.keys()
    for result in results.values():
        np.testing.assert_allclose(result.output, expected.numpy(), rtol=1e-5, atol=1e-5)
    across = {name: result.bytes_across for name, result in results.items()}
    # Each of 11 tokens crosses at most once, and back: a row, and 4 slots and weights out.
    assert across["deduplicated"] <= 11 * (2 * 4 * WIDTH + 4 * (8 + 4)) + COUNTS
    assert across["deduplicated"] < 0.6 * min(across["flat"], across["rail"])


def test_two_hosts(two_ranks: Path, tmp_path: Path) -> None:
    """Two torchruns on one machine, each with one of two ranks, as two hosts start them."""
    x = inputs(tmp_path, D)
    job = Job(two_ranks, tmp_path / "in.npz", tmp_path / "out.npz", 300.0, 1)
    words = ["-i", job.source, "-o", job.output, "--timeout", "300", "--quiet"]
    port = str(free_port())
    hosts = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--node-rank", str(host), "--nproc-per-node", "1", "--log-dir", str(tmp_path)),
                *("--master-addr", "127.0.0.1", "--master-port", port),
                *("-m", "moec", "run", str(job.folder), *map(str, words)),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for host in range(2)
    ]  # fmt: skip
    texts = [host.communicate(timeout=280)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], texts
    (expected,) = evaluate(MODEL, [x], model_of_graph().weights)
    assert job.output is not None
    with np.load(job.output) as file:
        (result,) = (file[name] for name in file)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            entries.killed,
            f"^rank 1 ended by signal SIGKILL {WAITING} ended",
        ),
        (
            entries.stopped,
            f"^rank 1 did not answer {WAITING} did not respond",
        ),
        (
            entries.hanging,
            f"^rank 1 did not answer {WAITING} did not respond",
        ),
        (entries.leaving, f"^rank 1 ended {WAITING} ended"),
        (entries.starving, rf"^rank 1, {WHERE}: too little memory for 4\.0 GB more"),
    ],
    ids=["killed", "stopped", "hanging", "leaving", "starving"],
)
def test_a_rank_that_fails(  # type: ignore[no-untyped-def]
    entry, message: str, flat: Path, tmp_path: Path, patient_launcher: None, temporary_files: Path
) -> None:
    """All ranks end soon after the event, although the job's time-out and the launcher's patience
    with ranks that ignore its signal are long."""
    inputs(tmp_path)
    job = Job(flat, tmp_path / "in.npz", tmp_path / "out.npz", 300.0, 1)
    with pytest.raises(RankError, match=message):
        launch(job, 4, entry)
    assert time.time() - float((tmp_path / "event").read_text()) < SOON
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
    with pytest.raises(ArtifactError, match=f"{name} was (altered|changed after)"):
        load_rank(copy, 1).code.package.arrays["router"]


def test_a_file_that_is_written_to_while_ranks_run(copy: Path) -> None:
    """Once in a call of the rank, before its first segment."""
    code = load_rank(copy, 1).code
    ranks = RankModel(code)
    path = copy / parts_of_arrays(copy, 1)["router"]
    path.write_bytes(path.read_bytes())
    with pytest.raises(ArtifactError, match="was changed while the model in it is in use"):
        ranks([torch.zeros(1, WIDTH)], {})


def test_another_processor(monkeypatch: pytest.MonkeyPatch, flat: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    message = r"flat\.ranks, rank 1: it was compiled for .*, and this machine is riscv64"
    with pytest.raises(ArtifactError, match=message):
        load_rank(flat, 1)


def test_an_existing_folder_is_left_alone(flat: Path) -> None:
    with pytest.raises(MoecError, match=r"exists; --force .* replaces it"):
        save_ranks(rank_programs(model(), FORMS["flat"]), FORMS["flat"], flat)
