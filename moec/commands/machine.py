"""Checks of this machine for moec: what is available, what is missing, and how to fix it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from moec.codegen.cpu import link
from moec.errors import TargetError
from moec.runtime.process.memory_limit import cpu_quota
from moec.runtime.process.threads import affine, available
from moec.target import cpu as target
from moec.target import nvidia

OK, NOTE, BAD = "ok", "note", "bad"


@dataclass(frozen=True)
class Check:
    """One line of the result. `mend` is the remedy, empty where none is needed."""

    name: str
    state: str
    says: str
    mend: str = ""


def examine() -> list[Check]:
    """All checks, in the order in which they are shown."""
    return [
        python(),
        *processor(Path("/proc/cpuinfo")),
        chosen_target(),
        *packages(),
        linker(os.environ, shutil.which),
        *threads(os.environ),
        memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup")),
        huge_pages(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        scratch(),
        *gpus(nvidia.driver(), nvidia.nvcc(), nvidia.nvrtc()),
    ]


def python() -> Check:
    says = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", OK, says)


def processor(cpuinfo: Path) -> list[Check]:
    """The CPU's name, its cores, and those of its features that the kernels use."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    physical = {
        tuple(part for part in block.splitlines() if part.startswith(("physical id", "core id")))
        for block in "\n".join(lines).split("\n\n")
        if block.strip()
    }
    usable = available()
    cores = f"{usable} of {os.cpu_count()} processors usable"
    if usable < affine():
        cores += f" (the container's quota is {cpu_quota():g})"
    if len(names) > len(physical) > 1:
        cores += f", {len(physical)} cores"
    have = target.host_features()
    used = sorted({f for t in target.TARGETS.values() for f in t.features} & have)
    name = names[0] if names else platform.processor() or "unknown"
    features = Check("features", OK, " ".join(used) or "none that a target uses")
    if not have:
        mend = "name the target yourself: moec compile --target avx2"
        says = "the system does not report the features of the CPU"
        features = Check("features", NOTE, says, mend)
    return [Check("cpu", OK, f"{name}; {cores}"), features]


def chosen_target() -> Check:
    """The target of "cpu" on this machine, and the features that a better one needs."""
    host = target.host()
    says = f"{host.name}: {host.vector_lanes} float lanes"
    says += ", bf16 dot products" if host.bf16_dot else ""
    says += ", int8 dot products" if host.int8_dot else ""
    says += ", bf16 tiles" if host.bf16_tiles else ""
    better = [
        f"{t.name} needs {' '.join(target.missing(t))}"
        for t in target.TARGETS.values()
        if len(t.features) > len(host.features)
    ]
    if better:
        says += f" ({'; '.join(better)})"
    if host.name == "generic" and platform.machine() in ("x86_64", "AMD64"):
        return Check("target", NOTE, says, "kernels will be slow: use a CPU with AVX2 or AVX-512")
    return Check("target", OK, says)


# ---- packages --------------------------------------------------------------------------

_PROBES = {
    "torch": "import torch; torch.ones(2, 2) @ torch.ones(2, 2)",
    "apache-tvm": "import tvm; assert tvm.runtime.enabled('llvm'), 'built without LLVM'",
    "onnxruntime-gpu": "import onnxruntime",
    "numba": "import numba",
    "transformers": "import transformers",
}
_CAPTURE = """
import os, sys
from moec.capture.speculate.search import describe_unknown_torch
if misfit := describe_unknown_torch():
    print(misfit, file=sys.stderr, flush=True)
    os._exit(1)  # libraries that write while the process ends would hide the sentence
"""
_PURPOSE = {
    "onnxruntime-gpu": "needed to check ONNX exports only",
    "transformers": "needed for Hugging Face checkpoints only",
    "tokenizers": "needed for prompts only",
    "jinja2": "needed for chats only",
}
_EXTRAS = {
    "gguf": "GGUF files",
    "serve": "moec serve",
    "guided": "texts of a grammar",
    "chat": "chats in a terminal",
    "cuda": "GPUs where there is no CUDA toolkit",
    "sign": "moec sign and --signed-by",
    "bench": "moec bench --serve and --plot",
}
"""The extras of which only what is missing is listed, with what they are for."""


def packages() -> list[Check]:
    """Whether the packages that moec requires are installed, in range, and loadable."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in requires("moec") or ()]
    by_extra = {
        extra: [r for r in requirements if _belongs(r.marker, extra) and r.name != "moec"]
        for extra in ("", "text", "compile", "onnx", "hf")
    }
    names = {r.name for group in by_extra.values() for r in group}
    programs = {
        name: _PROBES[name] for name in names if name in _PROBES and installed_version(name)
    }
    if "torch" in programs:
        programs["capture"] = _CAPTURE
    # What each of them imports, others import too: one process for all takes half the time.
    faults = probe(programs) if probe({"all": "\n".join(programs.values())}) else {}
    checks = [
        check_package(str(r.name), r.specifier, extra, faults)
        for extra, group in by_extra.items()
        for r in group
    ]
    if "torch" in programs and "torch" not in faults:
        checks.append(capture(faults))
    return checks + [
        check_extra(name, [str(r.name) for r in requirements if _belongs(r.marker, name)])
        for name in _EXTRAS
    ]


def check_extra(name: str, packages: Sequence[str]) -> Check:
    """Whether the packages of an extra are installed; those that are moec's own extras count
    elsewhere."""
    missing = [p for p in packages if p != "moec" and not installed_version(p)]
    if not missing:
        return Check(f"[{name}]", OK, f"installed: {_EXTRAS[name]}")
    says = f"without {', '.join(missing)}; needed for {_EXTRAS[name]}"
    return Check(f"[{name}]", NOTE, says, f"pip install 'moec[{name}]'")


def capture(faults: Mapping[str, str]) -> Check:
    """Whether capture knows the private parts of the installed torch."""
    if fault := faults.get("capture"):
        mend = "install what is missing above, or a version of torch that is tested"
        return Check("capture", NOTE, fault, mend)
    return Check("capture", OK, "knows this torch: modules may read data into Python")


def _belongs(marker: Any, extra: str) -> bool:
    """Whether a requirement belongs to an extra, or without a marker to the base."""
    if marker is None:
        return not extra
    return bool(extra) and bool(marker.evaluate({"extra": extra}))


def check_package(name: str, versions: object, extra: str, faults: Mapping[str, str]) -> Check:
    from packaging.specifiers import SpecifierSet

    installed = installed_version(name)
    weak = NOTE if extra or name in _PURPOSE else BAD
    purpose = f" ({_PURPOSE[name]})" if name in _PURPOSE else ""
    install = f"pip install 'moec[{extra}]'" if extra else f"pip install '{name}{versions}'"
    if not installed:
        return Check(name, weak, f"not installed{purpose}", install)
    if not SpecifierSet(str(versions)).contains(installed, prereleases=True):
        return Check(name, weak, f"{installed}, but moec needs {versions}{purpose}", install)
    if fault := faults.get(name):
        return Check(name, weak, f"{installed} fails to load: {fault}", f"reinstall it: {install}")
    return Check(name, OK, installed)


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def probe(programs: Mapping[str, str], seconds: float = 120) -> dict[str, str]:
    """The last line of the output of each program that failed. Each runs in its own process,
    because a broken native library may crash instead of raising an error."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, code in programs.items()
    }
    faults: dict[str, str] = {}
    for name, process in running.items():
        try:
            _, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            faults[name] = f"nothing after {seconds:.0f} s"
            continue
        if process.returncode:
            lines = stderr.strip().splitlines()
            code = process.returncode
            how = f"ended with signal {-code}" if code < 0 else f"ended with {code}"
            faults[name] = lines[-1] if lines else how
    return faults


# ---- the machine -----------------------------------------------------------------------


def linker(env: Mapping[str, str], which: Callable[[str], str | None]) -> Check:
    """The linker for kernels on this machine, and for the targets of other machines."""
    try:
        says = " ".join(link.linker("", env, which))
    except TargetError as error:
        return Check("linker", BAD, *(part.strip() for part in str(error).split(":", 1)))
    for triple in sorted({t.mtriple for t in target.TARGETS.values() if t.mtriple}):
        with suppress(TargetError):
            other = link.linker(triple, env, which)
            if other != link.linker("", env, which):
                says += f"; for {triple} {' '.join(other)}"
    return Check("linker", OK, says)


def threads(env: Mapping[str, str]) -> list[Check]:
    """The thread pools that an artifact and eager PyTorch would use."""
    usable = available()
    checks = []
    for variable, whose in (
        ("TVM_NUM_THREADS", "artifacts take"),
        ("OMP_NUM_THREADS", "eager PyTorch takes"),
    ):
        value = env.get(variable, "")
        if not value:
            checks.append(Check(variable, OK, f"not set: {whose} the default"))
        elif not value.isdigit() or int(value) < 1:
            checks.append(Check(variable, BAD, f"{value!r} is not a number", f"unset {variable}"))
        elif int(value) > usable:
            says = f"{value}, more than the {usable} processors usable"
            checks.append(Check(variable, NOTE, says, f"set {variable}={usable}"))
        else:
            checks.append(Check(variable, OK, f"{whose} {value}"))
    return checks


def memory(meminfo: Path, cgroup: Path) -> Check:
    """The free memory, and the limit of a container."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return Check("memory", NOTE, "the system does not report its memory")
    says = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        if limit < total:
            free = min(free, limit - used)
            says = f"{free / 1e9:.1f} GB free of {limit / 1e9:.1f} GB (limit of the container)"
    except (OSError, ValueError):
        pass
    if free < 2e9:
        return Check("memory", NOTE, says, "a compilation needs about 2.5 times the weights")
    return Check("memory", OK, says)


def huge_pages(enabled: Path) -> Check:
    try:
        mode = enabled.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return Check("huge pages", OK, "the system does not report them; they are optional")
    if mode == "never":
        says = "never: large weights may run slower (more TLB misses)"
        return Check("huge pages", NOTE, says, f"echo madvise | sudo tee {enabled}")
    return Check("huge pages", OK, mode)


def scratch() -> Check:
    """The folder for temporary files of compilers, and its free space."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    says = f"{free / 1e9:.1f} GB free in {folder}"
    if free < 1e9:
        return Check("disk", NOTE, says, "free some space, or set TMPDIR to another disk")
    return Check("disk", OK, says)


def gpus(
    driver: nvidia.Driver | None, nvcc: nvidia.Compiler | None, nvrtc: nvidia.Compiler | None
) -> list[Check]:
    """NVIDIA's driver, GPUs and compilers. None of them is required: CPUs need none."""
    if driver is None:
        text = "none; needed for cuda targets only"
    else:
        names = [f"{gpu.name} ({gpu.digits}, {gpu.memory / 1e9:.0f} GB)" for gpu in driver.gpus]
        text = f"{', '.join(names) or 'none'}; the driver runs CUDA {driver.version}"
    return [
        Check("gpu", OK, text),
        Check("nvcc", OK, _compiler(nvcc, used=True)),
        Check("nvrtc", OK, _compiler(nvrtc, used=nvcc is None)),
    ]


def _compiler(compiler: nvidia.Compiler | None, *, used: bool) -> str:
    if compiler is None:
        return "none; cuda targets need nvcc or NVRTC"
    use = "compiles for cuda targets" if used else "not used, as nvcc is installed"
    return f"{compiler.version}, {compiler.path}; {use}"


def as_json(checks: Sequence[Check]) -> str:
    ok, each = all(c.state != BAD for c in checks), [vars(c) for c in checks]
    facts = {"ok": ok, "moec": metadata("moec")["Version"], "checks": each}
    return json.dumps(facts, indent=1)
