"""Targets: their names, their CPU requirements, and that describing them needs no compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tvm

from moec.errors import TargetError
from moec.target import cpu
from moec.target import cpu as target
from moec.target.cpu import TARGETS, features_of, host, host_features, missing, parse, require


@pytest.mark.parametrize("name", TARGETS)
def test_llvm_knows_each_target_and_gives_it_the_features(name):
    target = tvm.target.Target(TARGETS[name].tvm())
    reference = set(tvm.target.codegen.llvm_get_cpu_features(target))
    assert set(TARGETS[name].features) <= reference


def test_cpu_is_the_best_that_this_machine_has():
    here = parse("cpu")
    assert here == host()
    assert not missing(here)
    better = [t for t in TARGETS.values() if len(t.features) > len(here.features)]
    assert all(missing(t) for t in better)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        TargetError,
        match=r"unknown target 'avx3'.*cpu, generic, avx2, avx2-vnni, avx512.*did you mean 'avx2'",
    ):
        parse("avx3")


def test_llvm_options_are_read():
    skylake = parse("llvm:-mcpu=skylake-avx512")
    assert (skylake.vector_lanes, skylake.bf16_dot, skylake.fma) == (16, False, True)
    more = parse("llvm:-mcpu=x86-64-v3,-mattr=+avx512f,+avx512bw,+avx512vl,+avx512dq")
    assert (more.mcpu, more.vector_lanes) == ("x86-64-v3", 16)
    assert parse("llvm:-mcpu=znver4").bf16_dot


@pytest.mark.parametrize(
    ("name", "lanes", "registers", "dot", "signed"),
    [
        ("x86-64-v3", 8, 16, False, False),
        ("alderlake", 8, 16, True, False),
        ("skylake-avx512", 16, 32, False, False),
        ("znver4", 16, 32, True, False),
        ("cortex-a72,-mtriple=aarch64-linux-gnu", 4, 32, False, False),
        ("neoverse-n1,-mtriple=aarch64-linux-gnu", 4, 32, True, True),
        ("neoverse-v1,-mtriple=aarch64-linux-gnu", 4, 32, True, False),
    ],
)
def test_dot_products_of_bytes(name, lanes, registers, dot, signed):
    t = parse(f"llvm:-mcpu={name}")
    assert (t.vector_lanes, t.vector_registers) == (lanes, registers)
    assert (t.int8_dot, t.int8_signed) == (dot, signed)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llvm:-mcpu=nonesuch", "LLVM knows no CPU 'nonesuch'"),
        ("llvm:-march=x", "'-march=x' is not a valid option"),
        ("llvm:-mcpu", "'-mcpu' is not a valid option"),
    ],
)
def test_wrong_llvm_options_are_named(name, words):
    with pytest.raises(TargetError, match=words):
        parse(name)


def test_a_lesser_machine_is_refused_with_what_it_lacks():
    avx2 = frozenset(TARGETS["avx2"].features)
    require(TARGETS["avx2"], avx2)
    require(TARGETS["generic"], frozenset())
    assert "avx512bf16" in missing(TARGETS["avx512-bf16"], avx2)
    with pytest.raises(TargetError, match=r"'avx512' needs avx512f, .*which this CPU lacks"):
        require(TARGETS["avx512"], avx2)


def test_the_check_of_an_artifact_needs_neither_tvm_nor_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['tvm'] = None\n"
        "from moec.target.cpu import parse, require, host\n"
        "require(parse('cpu')); parse('avx512-bf16')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_features_are_in_the_names_of_llvm():
    flags = "fpu avx2 avx512f avx512_bf16 avx512_vnni avx512_vp2intersect avx_vnni"
    names = "fpu avx2 avx512f avx512bf16 avx512vnni avx512vp2intersect avxvnni"
    assert features_of(f"processor : 0\nflags : {flags}") == set(names.split())
    assert features_of("flags : amx_bf16 amx_tile") == {"amx-bf16", "amx-tile"}
    assert features_of("Features : asimd asimddp bf16\n") == {"neon", "dotprod", "bf16"}
    assert features_of("processor : 0") == set()
    assert not any("_" in f for f in host_features() if f.startswith("avx"))


@pytest.mark.parametrize("inputs", [True, False])
def test_tiles_count_only_where_the_system_gives_them(monkeypatch, tmp_path, inputs):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : avx512f amx_tile amx_bf16\n")
    monkeypatch.setattr(target, "Path", lambda _: cpuinfo)
    monkeypatch.setattr(cpu, "permitted", lambda: inputs)
    result = host_features.__wrapped__()
    assert result == {"avx512f", *(("amx-tile", "amx-bf16") if inputs else ())}


def test_asking_for_tiles_twice_is_harmless():
    assert cpu.permitted() == cpu.permitted()
