"""The script that looks into the machine code of MoE blocks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.cuda import machine_code as script
from moec.codegen.backends.cuda.backend import CUDA, Cubin, cubin
from moec.codegen.lower import lower
from moec.target import nvidia
from moec.target.cuda import TARGETS, parse

DISASSEMBLY = """
//--------------------- .text.gathered_kernel_2   --------------------------
        /*0860*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, UP0 ;
        /*0870*/              @!P0 UTMALDG.2D [UR8], [UR4], desc[UR6] ;
//--------------------- .nv.shared.gathered_kernel_2 --------------------------
//--------------------- .text.route_kernel        --------------------------
        /*0010*/                   STL.64 [R1], R2 ;
        /*0020*/                   LDL R2, [R1] ;
        /*0030*/                   LDL R3, [R1+0x8] ;
"""


def test_instructions_of_each_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(DISASSEMBLY)
    program = tmp_path / "nvdisasm"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/text\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert script.instructions(b"") == {
        "gathered_kernel_2": {"HGMMA": 1, "UTMALDG": 1},
        "route_kernel": {"STL": 1, "LDL": 2},
    }


def test_what_is_a_fault() -> None:
    good, bad = Counter(HGMMA=4, UTMALDG=1), Counter(LDL=2, STL=1)
    newer, older = TARGETS["cuda:sm_90a"], TARGETS["cuda:sm_80"]
    counts = {"gathered_kernel": Counter(), "gathered_kernel_1": good, "grouped_kernel": bad}
    assert list(script.faults(counts, 16, newer)) == [
        "16 bytes of registers are spilled",
        "grouped_kernel accesses local memory in 3 instructions",
        "grouped does not use wgmma and TMA",
    ]
    assert list(script.faults({"grouped_kernel": Counter()}, 0, older)) == []


def test_the_script_fails_where_there_are_faults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = []

    def compiled(source: str, target: object) -> Cubin:
        sources.append(source)
        return Cubin(b"", 168, 0, 0)

    counts = [{"route_kernel": Counter()}, {"route_kernel": Counter(LDL=1)}]
    monkeypatch.setattr(script, "cubin", compiled)
    monkeypatch.setattr(script, "instructions", lambda _: counts[len(sources) - 1])
    with pytest.raises(SystemExit, match="1 of 2 have faults"):
        script.main(["--only", "deepseek", "--targets", "sm_80,sm_86"])
    assert "deepseek on sm_86: 168 registers, 0 bytes spilled" in capsys.readouterr().out
    assert all(" route_kernel(" in source for source in sources)


@pytest.mark.skipif(nvidia.nvcc() is None, reason="no nvcc")
def test_experts_of_an_artifact_for_two_architectures() -> None:
    """Gate and up, and down, of DeepSeek's block."""
    both, target = parse(script.BOTH), TARGETS[script.NEWER]
    source = script.products(
        lower(script.block("deepseek"), both, CUDA).modules[target.name], target
    )
    result = cubin(source, target)
    assert list(script.faults(script.instructions(result.content), result.spills, target)) == []
