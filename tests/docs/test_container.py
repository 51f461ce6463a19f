"""The container file of docs/install.md."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moec.serving.serve import command

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```dockerfile\n(.*?)```", text, flags=re.DOTALL)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in block.splitlines())]


def test_it_starts_a_server_that_reads_its_options() -> None:
    (entry,) = (json.loads(rest) for word, rest in instructions() if word == "ENTRYPOINT")
    assert entry[:2] == ["moec", "serve"]
    context = command.make_context("moec serve", entry[2:], resilient_parsing=True)
    (port,) = (int(rest) for word, rest in instructions() if word == "EXPOSE")
    assert (context.params["host"], context.params["port"]) == ("0.0.0.0", port)
    copied = {rest.split()[0] for word, rest in instructions() if word == "COPY"}
    assert copied == {"moec-*.whl", entry[2]}


def test_nothing_but_the_installation_runs_as_root() -> None:
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    assert words.index("USER") < words.index("ENTRYPOINT")


def test_it_is_built_and_runs_without_root(tmp_path: Path) -> None:
    builder = shutil.which("podman") or shutil.which("docker")
    if builder is None:
        pytest.skip("no podman and no docker")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(wheel, check=True)
    (tmp_path / "model.moec").touch()
    lines = [" ".join(instruction) for instruction in instructions()]
    (tmp_path / "Dockerfile").write_text("\n".join(lines))
    subprocess.run([builder, "build", "--tag", "moec-test", tmp_path], check=True)
    words = "import os, moec; print(os.getuid(), moec.load.__module__)"
    run = [builder, "run", "--rm", "--entrypoint", "python", "moec-test", "-c", words]
    shown = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    assert shown[0] != "0"
    assert shown[1] == "moec.model.load"
