"""The options of the backend, and its registration."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moec.dynamo.options import parse
from moec.errors import MoecError

ROOT = Path(__file__).resolve().parents[2]


def test_defaults() -> None:
    result = parse(None, None)
    assert (result.rest, result.opt_level, result.passes, result.strict) == (
        "inductor",
        2,
        "",
        False,
    )
    assert result.cache.folder == Path(os.environ["MOEC_CACHE"])


def test_all_options(tmp_path: Path) -> None:
    result = parse(
        {
            "rest": "eager",
            "target": "generic",
            "opt_level": 0,
            "passes": "+fuse-gate",
            "strict": True,
            "cache": tmp_path,
        },
        None,
    )
    assert (result.rest, result.target.name, result.cache.folder) == ("eager", "generic", tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rset": "eager"}, "there is no 'rset'; there are rest, target, opt_level"),
        ({"rest": "tvm"}, "rest is 'tvm': give one of inductor, eager"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"opt_level": 7}, "there is no optimisation level 7"),
        ({"passes": "+nothing"}, r"--passes \+nothing: write \+name or -name"),
        ({"passes": "+prune-experts(keep=0.5)"}, "prune-experts changes the model"),
        ({"passes": "+hoist-routers"}, "hoist-routers rewrites complete models, and torch.compile"),
        ({"passes": ["a"]}, "passes is a list"),
        ({"strict": "yes"}, "strict is 'yes': give True or False"),
        ({"cache": 3}, "cache is 3: give True, False or the path of a folder"),
        ({"precision": "bf16"}, r"there is no 'precision': .* module.to\(dtype\)"),
        ({"dynamic": True}, "pass dynamic=True to torch.compile itself"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MoecError, match=words):
        parse(options, None)


def test_modes_are_inductors() -> None:
    with pytest.raises(MoecError, match="mode='max-autotune' is an option of Inductor"):
        parse(None, "max-autotune")


def test_a_wrong_option_reaches_the_caller() -> None:
    run = torch.compile(nn.Linear(4, 4), backend="moec", options={"rset": 1})
    with pytest.raises(Exception, match="there is no 'rset'"):
        run(torch.randn(2, 4))


def test_no_compiler_for_inductor() -> None:
    from torch._inductor import config

    run = torch.compile(nn.Linear(4, 4), backend="moec")
    # Not pytest's monkeypatch: it deletes the setting where it puts it back.
    with (
        config.patch("cpp.cxx", ("no-such-compiler",)),
        pytest.raises(Exception, match=r'no C\+\+ compiler: install .* "eager"'),
    ):
        run(torch.randn(2, 4))


def test_torch_finds_the_backend_by_its_entry_point(tmp_path: Path) -> None:
    """In a process that does not import moec, beside metadata such as an installation writes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = project["entry-points"]["torch_dynamo_backends"]
    folder = tmp_path / "moec-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: moec\nVersion: 0.1.0\n")
    lines = [f"{name} = {where}\n" for name, where in group.items()]
    (folder / "entry_points.txt").write_text("[torch_dynamo_backends]\n" + "".join(lines))
    code = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
assert "moec" in torch._dynamo.list_backends() and "moec" not in sys.modules
run = torch.compile(model, backend="moec", options={"rest": "eager"})
x = torch.randn(2, 4)
torch.testing.assert_close(run(x), model(x))
import moec
assert moec.stats().compilations == 1
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
