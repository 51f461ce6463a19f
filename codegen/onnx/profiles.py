"""Profiles of ONNX files: which operators and dtypes one may contain, and whether it runs here."""

from __future__ import annotations

from dataclasses import dataclass

from moec.errors import TargetError, UsageError
from moec.ir.graph import Graph
from moec.oracle.tolerance import computed_dtypes

OPSETS = range(18, 26)
"""From the first opset in which every reduction takes its axes as an input, to the last in which
ONNX Runtime 1.31 can run whole models."""
FUSED = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding."""
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Profile:
    """`contrib`: whether operators of ONNX Runtime are allowed in addition to ONNX's.

    `floats` are the dtypes that its kernels compute in. `op_by_default`: an MoE block becomes one
    com.microsoft.MoE if that supports it. On a CPU it is off: sorted rows were as fast or faster at
    8, 64 and 512 tokens for experts of 128x64 and 1024x512, and within 0.1 ms per layer at one
    token. Experts of few bits use one com.microsoft.QMoE on CPUs too: for 64 experts of 2048x1024
    and 1 to 512 tokens, int8 and int4, it took 0.5 to 1.0 times as long as sorted rows with a
    MatMulNBits per expert.
    """

    name: str
    contrib: bool
    floats: tuple[str, ...]
    op_by_default: bool
    doc: str


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("cpu", True, ("f32", "f16", "f64"), False, "ONNX Runtime's CPU kernels"),
        Profile("cuda", True, ("f32", "f16", "bf16"), True, "ONNX Runtime's CUDA kernels"),
        Profile(
            "portable", False, ("f32", "f16", "f64"), False, "standard operators in ONNX Runtime"
        ),
    )
}


def profile_of(ep: str) -> Profile:
    """The profile of that name. Raises TargetError if there is none."""
    if ep not in PROFILES:
        raise TargetError(f"unknown execution provider {ep!r}: choose {', '.join(PROFILES)}")
    return PROFILES[ep]


def opset_of(opset: int | None) -> int:
    """The requested opset; None means the first opset with the fused operators.

    Raises UsageError for an opset that cannot be written.
    """
    if opset is None:
        return FUSED
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise UsageError(
            f"opset {opset!r} is not supported: choose {OPSETS[0]} to {OPSETS[-1]}, or none"
        )
    return opset


def check_dtypes(graph: Graph, profile: Profile) -> None:
    """Raises TargetError if the model computes in a float dtype that the profile has no kernels
    for."""
    for dtype in sorted(computed_dtypes(graph) - set(profile.floats)):
        raise TargetError(
            f"the model computes in {dtype}, in which {profile.doc} do not compute (ep="
            f'"{profile.name}"): convert it to float32 (--dtype float32), or choose another ep'
        )
