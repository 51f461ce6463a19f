"""com.microsoft.QMoE: one node for a whole block whose experts have weights of few bits.

    y = QMoE(x, chosen, fc1, scales1, b1, fc2, scales2, b2, zeros1, zeros2, router_weights=chosen)

`chosen` [T, E] has the routing weights of a token's experts, and 0 for other experts. The kernel
takes its k greatest, and uses them as weights unchanged, so every router of the graph is supported.
Cases that the kernel computes wrongly or slowly are never written: normalize_routing_weights=0
without router_weights, which ONNX Runtime 1.31 ignores (it still divides by the sum); negative
weights, which it drops; one scale per row (no block_size), many times slower; swiglu that is not
interleaved (swiglu_fusion=1); and 8-bit weights in blocks for rows of 16 bits, which it rounds to 8
bits at any accuracy_level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moec.codegen.onnx.moe.encoding import Encoding, packed
from moec.codegen.onnx.moe.moe_op import Fused, attributes, finished, in_turn, ordered
from moec.codegen.onnx.moe.quantised import accuracy_level
from moec.codegen.onnx.profiles import MICROSOFT
from moec.codegen.onnx.writer import NodeWriter, Weight
from moec.errors import NoMatch
from moec.ir.graph import Op, Value
from moec.ir.ops.experts.quantised import GroupedQuantised


def check(block: Fused) -> None:
    """Raises NoMatch, naming the attribute, for what MoE supports and QMoE does not."""
    up, down = _parts(block)
    if up.format.kind == "fp8":
        raise NoMatch("expert_weight_bits supports integers, and the weights are fp8")
    if up.format.float_zeros or down.format.float_zeros:
        raise NoMatch("zero points are integers, and those of the weights are floats")
    code = Encoding.of([up, down])
    if code.bits == 8 and up.format.row_bits == 16:
        raise NoMatch("accuracy_level rounds rows that are multiplied by 8-bit weights")
    for part in (up, down):
        width = int(str(part.matrices[0].codes.shape[-1]))
        if width % code.block:
            raise NoMatch(f"block_size {code.block} does not divide the {width} weights of a row")


def write(w: NodeWriter, op: Op, block: Fused) -> str:
    """The node, followed by the addition of the addend."""
    up, down = _parts(block)
    code = Encoding.of([up, down])
    x = w.cast(w.read(block.x), block.x.dtype, "f32")
    chosen = _chosen(w, block)
    output = w(
        "QMoE",
        *(x, chosen),
        *_layer(w, block, code, up),
        *_layer(w, block, code, down),
        *("", "", ""),
        *(_zeros(w, block, code, part) for part in (up, down)),
        *("", chosen),
        domain=MICROSOFT,
        **attributes(block, normalize=0),
        expert_weight_bits=code.bits,
        block_size=code.block,
        accuracy_level=accuracy_level(code.format),
    )
    return finished(w, op, block, output, "f32")


def _parts(block: Fused) -> tuple[GroupedQuantised, GroupedQuantised]:
    assert isinstance(block.up, GroupedQuantised)
    assert isinstance(block.down, GroupedQuantised)
    return block.up, block.down


def _chosen(w: NodeWriter, block: Fused) -> str:
    weights, ids = block.router.outputs
    row_weights = w.cast(w.read(weights), weights.dtype, "f32")
    shape = w.shape((weights.shape[0], block.experts))
    none = w("Expand", w.constant(0.0, "f32"), shape)
    return w("ScatterElements", none, w.read(ids), row_weights, axis=-1)


def _layer(w: NodeWriter, block: Fused, code: Encoding, part: GroupedQuantised) -> Sequence[str]:
    """Weights u8 [E, N, K * bits / 8], scales f32 [E, N, blocks], and biases f32 [E, N] or ""."""
    width = int(str(part.matrices[0].codes.shape[-1]))
    codes = [m.codes for m in part.matrices]
    scales = [m.scales for m in part.matrices]
    biases = [
        _stacked(w, block, part.biases, "f32", 0, lambda stack: stack.float())
        for _ in part.biases[:1]
    ]
    return (
        _stacked(
            w, block, codes, "u8", width * code.bits // 8,
            lambda stack: packed(code.codes(stack), code.bits),
        ),
        _stacked(
            w, block, scales, "f32", code.blocks(width), lambda stack: code.scales(stack, width)
        ),
        *(biases or [""]),
    )  # fmt: skip


def _zeros(w: NodeWriter, block: Fused, code: Encoding, part: GroupedQuantised) -> str:
    stacks = [m.zeros for m in part.matrices if m.zeros is not None]
    if not stacks:
        return ""
    width = int(str(part.matrices[0].codes.shape[-1]))
    last = -(-code.blocks(width) * code.bits // 8)
    return _stacked(
        w, block, stacks, "u8", last, lambda stack: packed(code.zeros(stack, width), code.bits)
    )


def _stacked(
    w: NodeWriter,
    block: Fused,
    stacks: Sequence[Value],
    dtype: str,
    last: int,
    make: Callable[[Tensor], Tensor],
) -> str:
    """[E, N, last] of all experts, with alternating rows of gate and up; [E, N] if `last` is 0."""
    for stack in stacks:
        if not w.is_param(stack):
            raise NoMatch(f"the weight {stack.name} is computed, so it cannot be interleaved")
    stacks = ordered(block, stacks)
    names = tuple(stack.name for stack in stacks)
    rows = len(stacks) * int(str(stacks[0].shape[1]))
    shape = (block.experts, rows, *([last] if last else []))
    weight = Weight(names, dtype, shape, lambda *tensors: make(in_turn(*tensors)))
    return w.weight(f"{names[0]}.stacked", weight)
