"""Whether weights of few bits are their weights: each within half a step of its code.

By `ir.formats.integer` a code is the nearest one, with the scale and the zero of its group. So a
weight is off by at most half of the distance of neighbouring values, and where it is beyond the
last of them by no more than the rounding of the scale explains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moec.errors import VerificationError
from moec.ir.formats.integer import dequantise, some_rows
from moec.ir.formats.notation import Format
from moec.ir.ops.experts.quantised_linear import QUANTISED_OPS, matrices_of
from moec.passes.core.runner import PassResult
from moec.report.quantisation import before_quantisation, stored_parts

_SLACK = 1.001
_BEYOND = 1.3
"""Steps by which the greatest of a group is beyond the last code: one, as that of +2^(bits - 1) is
missing, and what the scale was rounded by."""
_ROUNDED = 2.0**-8
"""A checkpoint's codes are compared with their values in bf16."""
_SOLVED = 8.0
"""Steps by which calibration moves a weight, to undo the errors of others of its row."""


def check_codes(pass_results: Sequence[PassResult]) -> None:
    """Compare all codes with the weights before they were rounded. Raises VerificationError, naming
    the weight."""
    exact = before_quantisation(pass_results)
    if len(exact) == len(pass_results):
        return
    before, after = exact[-1].program, pass_results[-1].program
    solved = {fit.weight for pass_result in pass_results for fit in pass_result.fits}
    ops = (op for op in after.graph.ops if op.name in QUANTISED_OPS)
    matrices = {s.matrix.codes.name: s for op in ops for s in matrices_of(op)}
    for name, stored in matrices.items():
        steps = _SOLVED if name.rpartition(".codes")[0] in solved else 0.5
        for number, weight, parts in stored_parts(stored, before, after):
            rows = some_rows(weight, *parts)
            wrong = torch.cat([_beyond(stored.format, steps, *block) for block in rows])
            if bool(wrong.any()):
                first = [n for n in (number, *torch.nonzero(wrong)[0].tolist()) if n is not None]
                raise VerificationError(
                    f"{int(wrong.sum())} weights of {name} are further from their codes than half "
                    f"a step of {stored.format}, the first at {first}: the "
                    "pass that rounds them is wrong"
                )


def _beyond(
    format: Format, steps: float, weight: Tensor, codes: Tensor, scales: Tensor, *zeros: Tensor
) -> Tensor:
    """Of each weight [N, K], whether it is too far from its code's value."""
    weight = weight.float()
    value = dequantise(format.kind, codes, scales, *zeros)
    blocks = weight.shape[-1] // scales.shape[-1]
    scale = scales.repeat_interleave(blocks, -1)
    if format.kind == "mxfp4":
        unit = torch.exp2(scale.float() - 127)
        greatest = torch.maximum(value.abs(), weight.abs()) / unit
        step = torch.where(greatest > 4, 2.0, torch.where(greatest > 2, 1.0, 0.5)) * unit
        ends = value.abs() >= 6 * unit
    elif format.kind == "fp8":
        unit = scale.float().abs()
        exponent = torch.frexp(torch.maximum(value.abs(), weight.abs()) / unit)[1] - 1
        step = torch.exp2(exponent.clamp(min=-6).float() - 3) * unit
        ends = value.abs() >= 448 * unit
    else:
        step = scale.float().abs()
        ends = (codes == 0) | (codes == 2**format.bits - 1)
    allowed = torch.where(ends, max(_BEYOND, steps), steps) * step * _SLACK
    return ~((weight - value).abs() <= allowed + _ROUNDED * weight.abs())
