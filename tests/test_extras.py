"""Without the compiler an artifact runs, and commands that need more say what to install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, requires
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moec.extras import EXTRAS, missing_extra
from moec.runtime.artifact import artifact
from tests.commands import models
from tests.runtime import toy

ROOT = Path(__file__).parents[1]
BLOCKED = """
import runpy, sys
BLOCKED = {"torch", "networkx", "numba", "llvmlite", "scipy", "sympy", "onnx", "onnxruntime",
           "transformers", "matplotlib", "sklearn"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
WITHOUT_TEXT = BLOCKED.replace("{", '{"tokenizers", "huggingface_hub", "jinja2", ', 1)
MOEC = BLOCKED + 'runpy.run_module("moec", run_name="__main__")'


def moec(*words: object, program: str = MOEC) -> subprocess.CompletedProcess[str]:
    """The command in a process where only the base and moec[text] can be imported."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "speaker.moec"
    artifact.write(
        toy.language_model(),
        path,
        graphs={"main": toy.GRAPH},
        files=toy.tokenizer_files(),
        extra={"report": models.report().to_dict()},
    )
    return path


def test_an_artifact_runs_is_inspected_and_verified(path: Path, tmp_path: Path) -> None:
    done = moec("run", path, "--prompt", "a b", "--max-new-tokens", 3)
    assert (done.returncode, done.stdout) == (0, " c d e\n"), done.stderr
    ids = np.ones((1, 2), np.int64)
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=ids)
    done = moec("run", path, "--input", tmp_path / "in.npz")
    assert (done.returncode, done.stdout) == (0, "logits: f32[1, 2, 8]\n"), done.stderr
    done = moec("inspect", path)
    assert done.returncode == 0, done.stderr
    assert "MoE blocks" in done.stdout
    done = moec("inspect", path, "--graph", tmp_path / "x.dot")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("pip install 'moec[compile]'\n")
    done = moec("verify", path)
    assert done.returncode == 0, done.stderr
    assert "its graphs were not read: the compiler is not installed" in done.stdout


def test_the_base_continues_tokens_and_says_what_text_needs(path: Path) -> None:
    program = MOEC.replace(BLOCKED, WITHOUT_TEXT)
    lines = [WITHOUT_TEXT, "import numpy, sys", "import moec", "m = moec.load(sys.argv[1])"]
    lines.append("print(m.generate([[0, 1]], max_new_tokens=3))")
    done = moec(path, program="\n".join(lines))
    assert (done.returncode, done.stdout) == (0, "[[0, 1, 2, 3, 4]]\n"), done.stderr
    assert moec("verify", path, program=program).returncode == 0
    assert moec("inspect", path, program=program).returncode == 0
    done = moec("run", path, "--prompt", "a b", program=program)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(
        "error: writing text needs tokenizers, which is not installed: pip install 'moec[text]'\n"
    )


def test_the_base_is_below_450_megabytes() -> None:
    """The size of a pip installation, from the sizes of the installed packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names: set[str] = set()
    for text in project["dependencies"]:
        add_needed(Requirement(text), names)
    assert {"apache-tvm", "numpy"} < names
    assert not names & {"torch", "tokenizers", "huggingface-hub", "onnxruntime-gpu", "numba"}
    files = [file.locate() for name in names for file in distribution(name).files or ()]
    folders = [ROOT / folder for folder in ("moec", "passes", "codegen", "runtime")]
    files += [path for folder in folders for path in folder.rglob("*")]
    assert sum(Path(file).stat().st_size for file in files if Path(file).is_file()) < 450e6


def add_needed(requirement: Requirement, names: set[str]) -> None:
    """Adds a package that is needed without an extra, and its own requirements."""
    name = canonicalize_name(requirement.name)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return
    if name not in names:
        names.add(name)
        for text in requires(name) or ():
            add_needed(Requirement(text), names)


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (("compile", "examples/demo.py:make", "-o", "x.moec"), "torch"),
        (("export", "examples/demo.py:make", "-o", "x.onnx"), "torch"),
        (("inspect", "examples/demo.py:make"), "torch"),
        (("list", "passes"), "sympy"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(words: tuple[str, ...], package: str) -> None:
    done = moec(*words)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line == (
        f"error: compiling a model needs {package}, which is not installed: "
        "pip install 'moec[compile]'"
    )


def test_python_says_the_same() -> None:
    lines = ["import moec", "moec.load", "try: moec.compile"]
    lines.append("except moec.MoecError as error: print(error)")
    code = "\n".join([BLOCKED, *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("compiling a model needs torch"), done.stderr


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"sklearn": "scikit-learn", "onnxruntime": "onnxruntime-gpu", "yaml": "pyyaml"}
    names["prometheus_client"] = "prometheus-client"
    for extra, packages in EXTRAS.items():
        listed = {re.split(r"[\[<>=]", item)[0] for item in project["optional-dependencies"][extra]}
        assert {names.get(package, package) for package in packages} <= listed


def test_a_module_of_no_extra() -> None:
    assert missing_extra(ModuleNotFoundError("No module named 'mine'", name="mine")) == ""
    assert missing_extra(ModuleNotFoundError("torch", name="torch.nn")).endswith("'moec[compile]'")
