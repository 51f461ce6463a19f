"""`moec.optimize`: the formats of weights that suit a memory and a quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moec.api import compile as compile_model
from moec.errors import UsageError
from moec.model.compiled import CompiledModel
from moec.optimisation.loss import parse_loss
from moec.optimisation.search import ChoiceLimits, measured_search
from moec.passes.approximate.choices.model_choices import ModelChoices, parse_format
from moec.passes.calibration.session import Approximate
from moec.pipeline import choose
from moec.runtime.process.byte_sizes import bytes_of

FORMATS = ("int8", "int4:32", "int4:128")
OTHERS = ("quant", "budget", "strict", "fuel", "stop_after", "choices")
"""Options of `moec.compile` that an optimisation does not take."""
ONCE = ("tune", "watch")
"""Options of the compilation after the search alone."""


def optimize(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calib: Any,
    memory: int | str | None = None,
    loss: str | None = None,
    formats: Sequence[str] = FORMATS,
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
    choices = choose_for(
        model, args, kwargs, calib=calib, memory=memory, loss=loss, formats=formats, passes=passes,
        **options,
    )  # fmt: skip
    return compile_chosen(model, choices, args, kwargs, calib=calib, passes=passes, **options)


def choose_for(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calib: Any,
    memory: int | str | None = None,
    loss: str | None = None,
    formats: Sequence[str] = FORMATS,
    passes: Any = "",
    **options: Any,
) -> ModelChoices:
    """The choices of `optimize`, without the compilation. Raises what `optimize` raises."""
    if other := next((name for name in OTHERS if name in options), None):
        raise UsageError(f"optimize chooses formats itself: leave {other} out")
    if memory is None and loss is None:
        raise UsageError("optimize needs a limit: give memory, loss, or both")
    limits = ChoiceLimits(
        None if memory is None else bytes_of(memory), None if loss is None else parse_loss(loss)
    )
    considered = tuple(map(parse_format, formats))
    before = {name: value for name, value in options.items() if name not in ONCE}
    before |= {"calib": calib} if _changes_model(passes) else {}
    compiled = compile_model(
        model, args, kwargs, passes=passes, **{**before, "quant": "none", "build": False}
    )
    options.get("progress", lambda phase: None)("choose")
    source = compiled.source
    with source.memory.reading():
        program = compiled.pass_results[-1].program
        search = measured_search(program, calib, source.files, source.memory, considered)
        return search.choices(limits)


def compile_chosen(
    model: Any,
    choices: ModelChoices,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calib: Any,
    passes: Any,
    **options: Any,
) -> CompiledModel:
    """The compilation with choices, which reads calibration data only where it needs them."""
    needed = choices.codes == "gptq" or _changes_model(passes)
    return compile_model(
        model, args, kwargs, choices=choices, passes=passes, calib=calib if needed else None,
        **options,
    )  # fmt: skip


def _changes_model(passes: Any) -> bool:
    """Whether one of the user's passes needs calibration data."""
    return any(isinstance(pass_, Approximate) for pass_ in choose(changes=passes))
