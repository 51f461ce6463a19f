"""`moec.optimize`: the formats of weights that suit a memory and a quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moec.api import compile as compile_model
from moec.errors import UsageError
from moec.formats.notation import Format, parse
from moec.model.compiled import CompiledModel
from moec.passes.quantise.choose.choose_formats import FORMATS, ChooseFormats
from moec.passes.quantise.choose.loss import parse_loss
from moec.runtime.process.byte_sizes import bytes_of

OTHERS = ("quant", "budget", "strict", "fuel", "stop_after")
"""Options of `moec.compile` that an optimisation does not take."""


def optimize(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calib: Any,
    memory: int | str | None = None,
    loss: str | None = None,
    formats: Sequence[str] = tuple(map(str, FORMATS)),
    passes: Any = "",
    **options: Any,
) -> CompiledModel:
    """Compile a model whose weights have the formats that suit a limit.

    `memory` ("4GiB", or bytes) is the most that all weights may take: of the choices that fit, the
    one with the least damage. `loss` limits the quality, measured on `calib` (tensors by input
    name, or the path of an .npz, .safetensors or .txt file): "kl<=0.02" (nats a token),
    "perplexity<=+1%", "perplexity<=12" or, for models that are no language model, "error<=0.05"; of
    the choices within it, the one with the fewest bytes. With both, that choice has to fit.

    Each product of experts, linear layer and head gets one of `formats` (as those of `quant`), or
    keeps its weights. The damage of each is predicted from the error of its results on the data, a
    mixed-integer program is solved, and the changed model is measured as a whole; the report has
    the choice, the measured damage and the predicted one. Codes are chosen by GPTQ where that
    measures better. `options` are those of `moec.compile`, which verifies the result; a checkpoint
    that is quantised already is dequantised first.

    Raises UsageError where no choice is within the limits, and what `moec.compile` raises.
    """
    if other := next((name for name in OTHERS if name in options), None):
        raise UsageError(f"optimize chooses formats itself: leave {other} out")
    if memory is None and loss is None:
        raise UsageError("optimize needs a limit: give memory, loss, or both")
    choose = ChooseFormats(
        memory=None if memory is None else bytes_of(memory),
        loss=None if loss is None else parse_loss(loss),
        formats=tuple(map(_format, formats)),
    )
    changes = [passes] if isinstance(passes, str) else list(passes)
    return compile_model(
        model, args, kwargs, calib=calib, quant="none", passes=[*changes, choose], **options
    )


def _format(text: str) -> Format:
    """Kernels of CPUs do not round the rows that fp8 weights multiply."""
    format = parse(text)
    return replace(format, row_bits=0) if format.kind == "fp8" else format
