"""`make release`: the wheel and the source distribution in dist/, tried in new environments.

    python .ci/release.py [3.11 3.12 ..]

For each of these Pythons that is on the machine, and each of `EXTRAS`, the wheel is installed in a
new environment from wheels alone, and runs a command. Printed is a line for each: what ran, what
failed, or which distribution has no wheel for that Python. Ends with 1 where a command failed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CHECKPOINT = ROOT / "examples/tiny_moe/checkpoint"
EXTRAS = {
    "": ("run", "tiny.moec", "--check"),
    "[text]": ("run", "tiny.moec", "--prompt", "def ", "--max-new-tokens", "4"),
    "[hf]": ("compile", CHECKPOINT, "-o", "made.moec"),
    "[all]": ("export", CHECKPOINT, "-o", "made.onnx", "--dtype", "float32"),
}


def call(*words: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, words)), cwd=folder, capture_output=True, text=True, check=False
    )


def built(folder: Path) -> Path:
    """The wheel in dist/, made of the source distribution beside it. Raises SystemExit where it has
    other files than the wheel of the clone."""
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build"))
    make = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    packed = call(sys.executable, "-c", make, ROOT / "dist", folder=source)
    assert packed.returncode == 0, packed.stderr
    archive = max((ROOT / "dist").glob("moec-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    wheels = []
    for name, origin in (("dist", archive), ("clone", source)):
        to = ROOT / "dist" if name == "dist" else folder / name
        result = call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", to, origin)
        assert result.returncode == 0, result.stderr
        wheels.append(max(to.glob("moec-*.whl"), key=lambda path: path.stat().st_mtime))
    of_archive, of_clone = (set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels)
    if of_archive != of_clone:
        sys.exit(f"the source distribution lacks or adds {sorted(of_archive ^ of_clone)[:9]}")
    return wheels[0]


def interpreter(version: str) -> Path | None:
    """A Python of that minor version on this machine."""
    candidates = [shutil.which(f"python{version}"), f"/usr/bin/python{version}"]
    candidates += sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    for path in filter(None, candidates):
        if Path(path).exists() and call(path, "-c", "import venv, ensurepip").returncode == 0:
            return Path(path)
    return None


def tried(python: Path, wheel: Path, extra: str, folder: Path) -> str:
    """What became of one environment: empty where its command ran."""
    environment = folder / "environment"
    call(python, "-m", "venv", "--clear", environment)
    pip = (environment / "bin/python", "-m", "pip", "install", "--quiet", "--only-binary=:all:")
    installed = call(*pip, f"{wheel}{extra}")
    if installed.returncode:
        missing = re.search(r"No matching distribution found for (\S+)", installed.stderr)
        return f"not tried: no wheel of {missing[1]}" if missing else f"FAILED: {installed.stderr}"
    ran = call(environment / "bin/moec", *EXTRAS[extra], folder=folder)
    return "" if ran.returncode == 0 else f"FAILED: moec {EXTRAS[extra][0]}: {ran.stderr[-2000:]}"


def main(versions: tuple[str, ...]) -> int:
    failed = 0
    os.environ.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = built(folder)
        result = call(
            sys.executable, "-m", "moec", "compile", CHECKPOINT, "-o", folder / "tiny.moec"
        )
        assert result.returncode == 0, result.stderr
        for version in versions:
            python = interpreter(version)
            for extra in EXTRAS:
                why = "not tried: this machine has none" if python is None else ""
                if python is not None:
                    for path in folder.glob("made.*"):
                        path.unlink()
                    why = tried(python, wheel, extra, folder)
                failed += why.startswith("FAILED")
                print(f"Python {version}  {wheel.name}{extra}  {why or 'ok'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or PYTHONS))
