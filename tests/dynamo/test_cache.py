"""Compiled blocks on disk: another process finds them; they are private and safe against damage."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.cache import LIBRARIES, CacheWarning
from tests.dynamo.modules import Masked
from tests.fresh import Program, Warm

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import torch, moec, moec.dynamo
from tests.dynamo.modules import Masked
torch.manual_seed(0)
model = Masked().eval()
run = torch.compile(model, backend="moec", dynamic=True, options={"rest": "eager", "strict": True})
with torch.no_grad():
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
found = moec.stats()
print(found.code_compiled, found.disk_hits)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of its own too: entries are damaged and removed here."""
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "own"))


def folder() -> Path:
    """Where the blocks are."""
    return Path(os.environ["MOEC_CACHE"], LIBRARIES)


def block() -> Path:
    (entry,) = folder().iterdir()
    return entry


def compile_once(**options: Any) -> moec.dynamo.Stats:
    """What one fresh compilation counts."""
    torch._dynamo.reset()
    moec.stats(reset=True)
    torch.manual_seed(0)
    model = Masked().eval()
    run = torch.compile(
        model, backend="moec", dynamic=True, options={"rest": "eager", "strict": True, **options}
    )
    with torch.no_grad():
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    return moec.stats()


def counts(stats: moec.dynamo.Stats) -> tuple[int, int]:
    return stats.code_compiled, stats.disk_hits


def test_a_second_process_starts_from_it(warm: Warm) -> None:
    assert counts(compile_once()) == (1, 0)
    done = warm.run(Program(CODE), ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]


def test_it_is_private_and_holds_no_weights() -> None:
    compile_once()
    assert stat.S_IMODE(folder().stat().st_mode) == 0o700
    assert stat.S_IMODE(block().stat().st_mode) == 0o600
    weight = next(Masked().parameters()).detach().numpy().tobytes()
    assert weight[:64] not in block().read_bytes()


def test_what_differs_is_compiled() -> None:
    compile_once()
    assert counts(compile_once()) == (0, 1)
    assert counts(compile_once(target="generic")) == (1, 0)
    assert counts(compile_once(opt_level=1)) == (1, 0)
    assert counts(compile_once(cache=False)) == (1, 0)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damage_is_compiled_anew_and_mended(damage: str) -> None:
    compile_once()
    entry = block()
    content = bytearray(entry.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    entry.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, content))
    assert counts(compile_once()) == (1, 0)
    assert counts(compile_once()) == (0, 1)


def test_an_entry_under_another_key_is_not_taken() -> None:
    compile_once()
    compile_once(target="generic")
    first, second = folder().iterdir()
    first.write_bytes(second.read_bytes())
    assert sum(compile_once(target=t).code_compiled for t in ("cpu", "generic")) == 1


def test_a_folder_that_others_may_write_costs_the_cache_alone(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.warns(CacheWarning, match="other users can write to it.*chmod 700"):
        record = compile_once(cache=shared)
    assert counts(record) == (1, 0)
    assert not list(shared.iterdir())
