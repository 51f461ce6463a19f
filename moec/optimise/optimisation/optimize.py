"""`moec.optimize`: the formats of weights, experts and top-k that suit a memory and a quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from moec.api import compile as compile_model
from moec.errors import UsageError
from moec.model.compiled import CompiledModel
from moec.optimise.optimisation.expert_moves import CONSTANT, MERGE, PRUNE, SHARED, THRESHOLD, TOP_K
from moec.optimise.optimisation.loss import parse_loss
from moec.optimise.optimisation.pinned import parse_pinned
from moec.optimise.optimisation.search import (
    EXPERT_FORMATS,
    ChoiceLimits,
    ChoiceSearch,
    measured_search,
)
from moec.optimise.optimisation.speed import choose_fast
from moec.options import compile_options
from moec.passes.approximate.choices.model_choices import ModelChoices, parse_format
from moec.passes.calibration.session import Approximate
from moec.pipeline import choose, lowering
from moec.runtime.process.byte_sizes import bytes_of
from moec.spelling import did_you_mean

FORMATS = ("int8", "int4:32", "int4:128")
MOVES = ("formats", PRUNE, MERGE, CONSTANT, SHARED, TOP_K, THRESHOLD, EXPERT_FORMATS)


def optimize(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calib: Any,
    memory: int | str | None = None,
    token_bytes: int | str | None = None,
    tokens_per_second: float | None = None,
    loss: str | None = None,
    formats: Sequence[str] = FORMATS,
    moves: Sequence[str] = MOVES[:1],
    pin: Mapping[str, str] = MappingProxyType({}),
    recover: int = 0,
    passes: Any = "",
    **options: Any,
) -> CompiledModel:
    """Compile a model whose weights have the formats that suit a limit.

    `memory` ("4GiB", or bytes) is the most that all weights may take: of the choices that fit, the
    one with the least damage. `token_bytes` is the most of them that a token reads: of each layer
    top-k experts, and all else but tables of embeddings. `tokens_per_second` is what the compiled
    model has to write of one text on this machine: the model as it is and up to four choices are
    compiled and measured. `loss` limits the quality, measured on
    `calib` (tensors by input name, or the path of an .npz, .safetensors or .txt file): "kl<=0.02"
    (nats a token), "perplexity<=+1%", "perplexity<=12" or, for models that are no language model,
    "error<=0.05"; of the choices within it, the one with the fewest bytes, which has to fit.

    `moves` are what may be chosen: "formats", "expert-formats" (those of single experts too),
    "prune" (experts of a layer), "merge" (those of similar results), "constant" (experts that give
    the mean of their results), "shared" (a layer's shared expert), "top-k" (a smaller one) and
    "threshold" (a token skips experts with small weights); `token_bytes` counts the mean of the
    experts that a token reads.
    Each product of experts, linear layer and head gets one of `formats` (as those of `quant`), or
    keeps its weights; those whose names match a pattern of `pin` get the format of it
    ("unchanged": their weights). The damage of each choice is measured or predicted from the error
    of its results on the data, a mixed-integer program is solved, and the changed model is measured
    as a whole; the report has the choice, the measured damage and the predicted one. Codes are
    chosen by GPTQ where that measures better. Then the routers are trained for `recover` steps on
    the data, of which a part is held out; they stay as they were if nothing is better on it.
    `options` are those of `moec.compile`, which verifies the result; a checkpoint that is quantised
    already is dequantised first.

    Raises UsageError where no choice is within the limits, and what `moec.compile` raises.
    """
    limits = choice_limits(memory, token_bytes, loss, tokens_per_second)
    searched = search(
        model,
        args,
        kwargs,
        calib=calib,
        formats=formats,
        moves=moves,
        pin=pin,
        recover=recover,
        passes=passes,
        **options,
    )

    def compiled(choices: ModelChoices | None) -> CompiledModel:
        return compile_choices(model, choices, args, kwargs, calib=calib, passes=passes, **options)

    fast = choose_fast(searched, limits, tokens_per_second, compiled)
    return fast.compiled or compiled(fast.choices)


def compile_choices(
    model: Any,
    choices: ModelChoices | None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calib: Any,
    passes: Any = "",
    **options: Any,
) -> CompiledModel:
    """The model with what was chosen; without choices as it is, to be measured only."""
    options = {**options, "passes": passes}
    if choices is None:
        options |= {"verify": False, **_data(calib, passes)}
    else:
        options |= {"choices": choices, "calib": calib}
    return compile_model(model, args, kwargs, **options)


def _data(calib: Any, passes: Any) -> dict[str, Any]:
    """The data, where passes of the user's need it."""
    changes = any(isinstance(pass_, Approximate) for pass_ in choose(changes=passes))
    return {"calib": calib} if changes else {}


def choice_limits(
    memory: int | str | None,
    token_bytes: int | str | None,
    loss: str | None,
    tokens_per_second: float | None = None,
) -> ChoiceLimits:
    """Raises UsageError where none is set, or one has another form."""
    if memory is None and token_bytes is None and loss is None and tokens_per_second is None:
        raise UsageError(
            "optimize needs a limit: give memory, token_bytes, tokens_per_second, loss, or several"
        )
    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:
        raise UsageError(f"tokens_per_second is {tokens_per_second}: give a number above 0")
    return ChoiceLimits(
        None if memory is None else bytes_of(memory),
        None if token_bytes is None else bytes_of(token_bytes, "token_bytes"),
        None if loss is None else parse_loss(loss),
    )


def search(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calib: Any,
    formats: Sequence[str] = FORMATS,
    moves: Sequence[str] = MOVES[:1],
    pin: Mapping[str, str] = MappingProxyType({}),
    recover: int = 0,
    passes: Any = "",
    **options: Any,
) -> ChoiceSearch:
    """The costs of all that `optimize` can choose, measured. Raises what `optimize` raises."""
    all_options = compile_options()
    if other := next(
        (n for n in options if n in all_options and not all_options[n].optimize), None
    ):
        raise UsageError(f"optimize chooses formats itself: leave {other} out")
    if isinstance(recover, bool) or not isinstance(recover, int) or recover < 0:
        raise UsageError(f"recover is {recover!r}: give a number of steps, such as 300")
    for move in moves:
        if move not in MOVES:
            near = did_you_mean(move, MOVES)
            raise UsageError(f"{move!r} is no move: moves are {', '.join(MOVES)}{near}")
    fewer = next((move for move in (PRUNE, MERGE, CONSTANT) if move in moves), None)
    if EXPERT_FORMATS in moves and fewer:
        raise UsageError(
            f"moves {EXPERT_FORMATS} and {fewer}: fewer experts change the numbers of others, by "
            "which formats are chosen: leave one of the moves out"
        )
    considered = (
        tuple(map(parse_format, formats)) if {MOVES[0], EXPERT_FORMATS} & set(moves) else ()
    )
    pinned = parse_pinned(pin)
    before = {k: value for k, value in options.items() if k != "watch"}
    before |= {"passes": passes, "quant": "none", "build": False, **_data(calib, passes)}
    compiled = compile_model(model, args, kwargs, **before)
    progress = options.get("progress", lambda phase: None)
    progress("measure")
    after = lowering(choose(options.get("opt_level", 2), passes))
    with compiled.source.memory.reading():
        costs = measured_search(compiled, after, calib, considered, moves, pinned, recover)
    progress("choose")
    return costs
