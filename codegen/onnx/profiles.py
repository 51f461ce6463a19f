"""What a file is made for: which operators and dtypes it may hold, and whether it runs here."""

from __future__ import annotations

from dataclasses import dataclass

from moec.errors import TargetError, UsageError
from moec.interpret.tolerance import computed_dtypes
from moec.ir.graph import Graph

OPSETS = range(18, 26)
"""From the first in which every reduction takes its axes as an input to the last that ONNX
Runtime 1.31 runs whole models of."""
FUSED = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding."""
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Profile:
    """`contrib`: whether ONNX Runtime's own operators are allowed besides the standard's.

    `floats` are the dtypes that its kernels compute in. `op_by_default` says that an MoE block
    becomes one com.microsoft.MoE wherever that can express it: not on a CPU, where sorted rows
    were as fast or faster at 8, 64 and 512 tokens for experts of 128x64 and 1024x512, and within
    0.1 ms a layer at one token. Experts in few bits are another matter, on a CPU too: one
    com.microsoft.QMoE took 0.5 to 1.0 times as long as sorted rows with a MatMulNBits an expert,
    for 64 experts of 2048x1024 and 1 to 512 tokens, int8 and int4.
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
    """Raises TargetError where there is none of that name."""
    if ep not in PROFILES:
        raise TargetError(f"there is no execution provider {ep!r}: choose {', '.join(PROFILES)}")
    return PROFILES[ep]


def opset_of(opset: int | None) -> int:
    """The opset that is asked for, or the first with the fused operators.

    Raises UsageError for one that cannot be written.
    """
    if opset is None:
        return FUSED
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise UsageError(
            f"opset {opset!r} cannot be written: choose {OPSETS[0]} to {OPSETS[-1]}, or none"
        )
    return opset


def check_dtypes(graph: Graph, profile: Profile) -> None:
    """Raises TargetError where the model computes in floats that the profile has no kernels for."""
    for dtype in sorted(computed_dtypes(graph) - set(profile.floats)):
        raise TargetError(
            f"the model computes in {dtype}, in which {profile.doc} do not compute (ep="
            f'"{profile.name}"): convert it to float32 (--dtype float32), or choose another ep'
        )
