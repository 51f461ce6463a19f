"""softmax(q @ k.T * scale + mask) @ v as one CPU kernel: see problem.py for the sizes.

Many query rows use tiles of rows and packed blocks of keys (prefill.py); few, as when one token is
generated, read keys and values without packing (decode.py). Sums have one order, for any number of
threads.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cpu.attention.decode import few, takes
from moec.codegen.cpu.attention.prefill import tiled
from moec.codegen.cpu.attention.problem import arguments
from moec.codegen.cpu.frame import kernel
from moec.codegen.specs.attention import AttentionSpec, MaskSpec
from moec.target.cpu import CpuTarget

__all__ = ["AttentionSpec", "MaskSpec", "attention"]


def attention(spec: AttentionSpec, target: CpuTarget, name: str = "attention") -> PrimFunc:
    """The kernel (q, k, v, mask?, sinks?, first?, out), all contiguous.

    A row that may attend to nothing gives zeros, as torch's scaled_dot_product_attention does.
    """
    with kernel(name, target) as frame:
        p = arguments(spec, target)
        with T.If(p.queries <= takes(spec.group)):
            with T.Then():
                few(p)
            with T.Else():
                tiled(p)
    return frame.function
