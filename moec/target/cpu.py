"""Descriptions of CPUs, from which kernels are generated and by which artifacts are checked.

A target is chosen by name. "cpu" is this machine; the others are the same everywhere:

    generic       any machine that LLVM knows as its default: 4 lanes, no fused multiply-add
    avx2          x86-64-v3: 8 lanes, FMA, half precision converted by hardware
    avx2-vnni     avx2 with dot products of int8 quadruples (AVX-VNNI)
    avx512        x86-64-v4: 16 lanes
    avx512-bf16   x86-64-v4 with dot products of bf16 pairs and of int8 quadruples
    amx           avx512-bf16 with products of whole tiles of bf16 and int8
    neon-dotprod  aarch64: 4 lanes, with dot products of int8 quadruples
    null          generates no code: shows what would be compiled, in a second
    llvm:OPTIONS  -mcpu=, -mattr= and -mtriple= in LLVM's syntax

Only the `llvm:` form needs TVM. Everything else, including the check of an artifact's features,
needs neither TVM nor torch.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from moec.errors import TargetError, TargetNameError
from moec.spelling import did_you_mean

# Linux, Documentation/arch/x86/xstate.rst: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def permitted() -> bool:
    """Request the tile registers from Linux, for all threads of this process. Returns whether it
    granted them.

    Repeated requests are harmless. Signals need larger stacks from then on.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


NULL = "null"
"""The name of a target for this machine without code: see `moec.codegen.backends.registry`."""

_V3 = ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_AMX = ("amx-tile", "amx-bf16", "amx-int8")
# Linux has other names than LLVM for some features.
_LINUX_NAMES = {"abm": "lzcnt", "bmi1": "bmi", "asimd": "neon", "asimddp": "dotprod"}
_INT8_DOT = {16: "avx512vnni", 8: "avxvnni", 4: "dotprod"}
_BEYOND_V4 = (
    *("avx512bf16", "avx512bitalg", "avx512vbmi", "avx512vbmi2", "avx512vnni", "avx512vpopcntdq"),
    *("avx512ifma", "gfni", "vpclmulqdq", "avxvnni", "i8mm"),
    *_AMX,
)


@dataclass(frozen=True)
class CpuNeeds:
    """The CPU for which a library was compiled."""

    name: str
    mcpu: str = ""
    mattr: tuple[str, ...] = ()
    mtriple: str = ""
    features: tuple[str, ...] = ()  # LLVM's names of the features that the code may use


@dataclass(frozen=True)
class CpuTarget:
    """A CPU for kernels. `features` are LLVM's names of those that the code may use."""

    name: str
    mcpu: str = ""  # empty: LLVM's default for the machine
    mattr: tuple[str, ...] = ()  # features to add to or remove from mcpu, with a sign
    mtriple: str = ""
    features: tuple[str, ...] = ()
    vector_lanes: int = 4  # of float32
    vector_registers: int = 16
    l2: int = 512 * 1024  # bytes of the second-level cache of one core
    kind: str = "cpu"

    @property
    def needs(self) -> CpuNeeds:
        """The properties that decide whether code runs on a machine, and how weights are packed."""
        return CpuNeeds(self.name, self.mcpu, self.mattr, self.mtriple, self.features)

    @property
    def fma(self) -> bool:
        return "fma" in self.features

    @property
    def f16_convert(self) -> bool:
        """Whether the hardware converts half precision, as every aarch64 does."""
        return "f16c" in self.features or "neon" in self.features

    @property
    def bf16_dot(self) -> bool:
        """Whether one instruction adds the dot products of bf16 pairs to float32 lanes."""
        return self.vector_lanes == 16 and "avx512bf16" in self.features

    @property
    def bf16_tiles(self) -> bool:
        """Whether one instruction multiplies tiles: 16 rows of 32 bf16 by 32 times 16."""
        return self.bf16_dot and "amx-bf16" in self.features

    @property
    def int8_tiles(self) -> bool:
        """Whether one instruction multiplies tiles: 16 rows of 64 int8 by 64 times 16."""
        return self.int8_dot and "amx-int8" in self.features

    @property
    def int8_dot(self) -> bool:
        """Whether one instruction adds the dot products of int8 quadruples to int32 lanes."""
        return _INT8_DOT[self.vector_lanes] in self.features

    @property
    def int8_signed(self) -> bool:
        """Whether these instructions multiply signed numbers by signed ones, not unsigned ones."""
        return self.int8_dot and self.vector_lanes == 4 and "i8mm" not in self.features

    @property
    def byte_pairs(self) -> bool:
        """Whether one instruction multiplies unsigned bytes by signed ones and adds the products
        of neighbours, in 16 bits."""
        return {8: "avx2", 16: "avx512bw"}.get(self.vector_lanes) in self.features

    @property
    def tile_rows(self) -> int:
        """Rows of the register tile: its accumulators, weights and one input fit the registers."""
        return 6

    @property
    def tile_vectors(self) -> int:
        """Width of the register tile in vectors."""
        return 4 if self.vector_registers >= 32 else 2

    def tvm(self) -> dict[str, object]:
        """The argument of `tvm.target.Target` that compiles for this CPU."""
        arguments: dict[str, object] = {"kind": "llvm"}
        if self.mcpu:
            arguments["mcpu"] = self.mcpu
        if self.mattr:
            arguments["mattr"] = list(self.mattr)
        if self.mtriple:
            arguments["mtriple"] = self.mtriple
        return arguments


TARGETS: dict[str, CpuTarget] = {
    t.name: t
    for t in (
        CpuTarget("generic"),
        CpuTarget("avx2", mcpu="x86-64-v3", features=_V3, vector_lanes=8),
        CpuTarget(
            "avx2-vnni",
            mcpu="x86-64-v3",
            mattr=("+avxvnni",),
            features=(*_V3, "avxvnni"),
            vector_lanes=8,
        ),
        CpuTarget(
            "avx512",
            mcpu="x86-64-v4",
            mattr=("-prefer-256-bit",),
            features=_V4,
            vector_lanes=16,
            vector_registers=32,
            l2=1024 * 1024,
        ),
        CpuTarget(
            "avx512-bf16",
            mcpu="x86-64-v4",
            mattr=("-prefer-256-bit", "+avx512bf16", "+avx512vnni"),
            features=(*_V4, "avx512bf16", "avx512vnni"),
            vector_lanes=16,
            vector_registers=32,
            l2=1024 * 1024,
        ),
        CpuTarget(
            "amx",
            mcpu="x86-64-v4",
            mattr=("-prefer-256-bit", *(f"+{f}" for f in ("avx512bf16", "avx512vnni", *_AMX))),
            features=(*_V4, "avx512bf16", "avx512vnni", *_AMX),
            vector_lanes=16,
            vector_registers=32,
            l2=2 * 1024 * 1024,
        ),
        CpuTarget(
            "neon-dotprod",
            mcpu="generic",
            mattr=("+dotprod",),
            mtriple="aarch64-linux-gnu",
            features=("neon", "dotprod"),
            vector_registers=32,
        ),
    )
}


def parse(name: str) -> CpuTarget:
    """The target of that name: "cpu", a name in TARGETS, "null" or "llvm:-mcpu=...".

    Raises TargetError for any other name, listing the known ones.
    """
    if name == "cpu":
        return host()
    if name in TARGETS:
        return TARGETS[name]
    if name == NULL:
        return replace(host(), name=NULL, kind=NULL)
    if name.startswith("llvm:"):
        return _from_llvm(name)
    names = ["cpu", *TARGETS, NULL, "llvm:-mcpu=...", "cuda:sm_80"]
    raise TargetNameError(
        f"unknown target {name!r}; the known targets are {', '.join(names)} and other GPUs "
        f"(see `moec list targets`){did_you_mean(name, names)}"
    )


@cache
def host_features() -> frozenset[str]:
    """The features of this machine's CPU in LLVM's names; empty where the system does not list
    them.

    Linux grants the tile registers to a process only on request, so this requests them. They are
    left out if Linux refuses (an old kernel, a sandbox).
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    features = features_of(text)
    return features if features.isdisjoint(_AMX) or permitted() else features - set(_AMX)


def features_of(cpuinfo: str) -> frozenset[str]:
    """The features that Linux lists, in LLVM's names."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(map(_llvm_name, value.split()))
    return frozenset()


def _llvm_name(flag: str) -> str:
    named = _LINUX_NAMES.get(flag, flag)
    if named.startswith("amx_"):
        return named.replace("_", "-")
    return named.replace("_", "") if named.startswith(("avx512_", "avx_")) else named


@cache
def host() -> CpuTarget:
    """The named target with the most features that this machine can run, with its cache size."""
    usable = [t for t in TARGETS.values() if not missing(t)]
    best = max(usable, key=lambda t: len(t.features))
    return replace(best, l2=_host_l2() or best.l2)


def missing(target: CpuTarget, available: frozenset[str] | None = None) -> tuple[str, ...]:
    """The features of `target` that are not `available` (by default: on this machine)."""
    have = host_features() if available is None else available
    return tuple(f for f in target.features if f not in have)


def require(target: CpuTarget, available: frozenset[str] | None = None) -> None:
    """Raises TargetError unless this machine can run code for `target`."""
    if lacking := missing(target, available):
        raise TargetError(
            f"target {target.name!r} needs {', '.join(lacking)}, which this CPU lacks; "
            f"compile for this machine with target 'cpu' (here: {host().name!r}) or for 'generic'"
        )


def processor() -> str:
    """The system's name of this machine's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(names, platform.processor())
    except OSError:
        return platform.processor()


def _host_l2() -> int:
    return next((size for level, size in _host_caches() if level == 2), 0)


def _host_caches() -> Iterator[tuple[int, int]]:
    """Level and bytes of each cache of the first core, where the system lists them."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level = int((index / "level").read_text())
            size = int((index / "size").read_text().strip().rstrip("K")) * 1024
        except (OSError, ValueError):
            continue
        yield level, size


def _from_llvm(name: str) -> CpuTarget:
    options: dict[str, str] = {}
    for word in name.removeprefix("llvm:").replace(",-m", " -m").split():
        key, equals, value = word.partition("=")
        if key not in ("-mcpu", "-mattr", "-mtriple") or not equals or not value:
            raise TargetNameError(
                f"target {name!r}: {word!r} is not a valid option: write llvm:-mcpu=CPU, and if "
                "needed -mattr=+FEATURE,-FEATURE and -mtriple=TRIPLE"
            )
        options[key] = value

    # TVM is slow to import and absent from run-only processes, which do not get here.
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    mattr = tuple(options["-mattr"].split(",")) if "-mattr" in options else ()
    plain = CpuTarget(name, options.get("-mcpu", ""), mattr, options.get("-mtriple", ""))
    if plain.mcpu and not plain.mtriple and not codegen.llvm_is_valid_cpu(plain.mcpu, _triple()):
        raise TargetNameError(f"target {name!r}: LLVM knows no CPU {plain.mcpu!r} on {_triple()}")
    features = {str(f) for f in codegen.llvm_get_cpu_features(TvmTarget(plain.tvm()))}
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= features
    # Tuning hints are listed with the features; an artifact may only require what a CPU reports.
    reported = {*_V4, *_LINUX_NAMES.values(), *_BEYOND_V4}
    return replace(
        plain,
        features=tuple(sorted(features & reported)),
        mattr=(*mattr, "-prefer-256-bit") if "prefer-256-bit" in features and wide else mattr,
        vector_lanes=16 if wide else 8 if "avx2" in features else 4,
        vector_registers=32 if wide or "neon" in features else 16,
        l2=1024 * 1024 if wide else 512 * 1024,
    )


def _triple() -> str:
    from tvm.target import codegen

    return str(codegen.llvm_get_system_triple())
