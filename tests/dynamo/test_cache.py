"""Compiled blocks on disk: found again by another process, private, and safe against damage."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.dynamo import FallbackWarning
from tests.dynamo.modules import Masked

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


def folder() -> Path:
    return Path(os.environ["MOEC_CACHE"])


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


def counts(found: moec.dynamo.Stats) -> tuple[int, int]:
    return found.code_compiled, found.disk_hits


def test_a_second_process_starts_from_it() -> None:
    assert counts(compile_once()) == (1, 0)
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]


def test_it_is_private_and_holds_no_weights() -> None:
    compile_once()
    (entry,) = folder().iterdir()
    assert stat.S_IMODE(folder().stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    found = moec.runtime.artifact.read(entry)
    assert not found.manifest.arrays


def test_what_differs_is_compiled() -> None:
    compile_once()
    assert counts(compile_once()) == (0, 1)
    assert counts(compile_once(target="generic")) == (1, 0)
    assert counts(compile_once(opt_level=1)) == (1, 0)
    assert counts(compile_once(cache=False)) == (1, 0)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damage_is_compiled_anew_and_mended(damage: str) -> None:
    compile_once()
    (entry,) = folder().iterdir()
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


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.warns(FallbackWarning, match="is not yours alone.*chmod 700"):
        compile_once(cache=shared, strict=False)
    assert not list(shared.iterdir())


def test_what_was_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = []
    for level in range(3):
        compile_once(opt_level=level)
        (new,) = set(folder().iterdir()) - set(entries)
        entries.append(new)
    room = sum(entries[level].stat().st_size for level in (0, 2)) + 1000
    entries[2].unlink()
    for age, path in zip((30, 20), entries, strict=False):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    assert counts(compile_once(opt_level=0)) == (0, 1)  # the older of the two is used last
    monkeypatch.setenv("MOEC_CACHE_SIZE", str(room / 2**30))
    assert counts(compile_once(opt_level=2)) == (1, 0)
    assert [path.exists() for path in entries] == [True, False, True]


def test_an_entry_larger_than_the_limit_is_kept_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE_SIZE", "1e-6")
    compile_once()
    compile_once(opt_level=1)
    assert len(list(folder().iterdir())) == 1
    assert counts(compile_once(opt_level=1)) == (0, 1)


@pytest.mark.parametrize("given", ["much", "-1", "0", "inf", "nan"])
def test_a_limit_that_is_no_size(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("MOEC_CACHE_SIZE", given)
    with pytest.warns(FallbackWarning, match=f"MOEC_CACHE_SIZE is '{given}': give GiB"):
        compile_once(strict=False)
