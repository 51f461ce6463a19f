"""Limits of tokens a second, by what compiled models are measured to write on this machine.

Writing one text reads weights and little else, so a token takes about as long as the bytes that it
reads. The model as it is is measured, which gives a limit of bytes for a token; the choice within
it is compiled and measured too, and solved again for fewer bytes where it is slower.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from moec.errors import SetupError, UsageError
from moec.inspect.bench.contenders import compiled as contender
from moec.inspect.bench.race import Load, race
from moec.model.compiled import CompiledModel
from moec.optimise.optimisation.search import ChoiceLimits, ChoiceSearch
from moec.passes.approximate.choices.model_choices import ModelChoices

TRIES = 4
"""How many choices are compiled and measured."""
PROMPT, NEW, ROUNDS = 32, 16, 3

Compile = Callable[[ModelChoices | None], CompiledModel]
Measure = Callable[[CompiledModel], float]


@dataclass(frozen=True, eq=False)
class FastChoice:
    """A choice; where a speed was asked for, compiled, with the tokens a second that it was
    measured to write."""

    choices: ModelChoices
    compiled: CompiledModel | None = None
    tokens_per_second: float | None = None


def writing_speed(model: CompiledModel) -> float:
    """Tokens a second of one text, the median of steps after a short prompt. Raises UsageError for
    a model that does not write text, or not on this machine."""
    package, executor = model.ready()
    generation = package.generation
    if generation is None:
        raise SetupError(
            "tokens a second limit models that write text step by step, and this one does not: "
            f"{package.no_generation}"
        )
    prompt = min(PROMPT, (generation.longest or 2 * PROMPT) // 2)
    load = Load(1, prompt, NEW, generation.vocabulary)
    (times,) = race([contender(executor)], load, ROUNDS)
    return 1 / statistics.median(times.decode)


def choose_fast(
    search: ChoiceSearch,
    limits: ChoiceLimits,
    least: float | None,
    compile_model: Compile,
    measure: Measure = writing_speed,
) -> FastChoice:
    """The choice within the limits that writes at least `least` tokens a second, if given.

    Raises UsageError where the model does as it is, and where no choice within the limits does.
    """
    if least is None:
        return FastChoice(search.choices(limits))
    speed = measure(compile_model(None))
    if speed >= least and limits == ChoiceLimits():
        raise UsageError(f"the model writes {speed:.3g} tokens a second as it is: use moec compile")
    read, fastest = search.token_bytes("damage"), speed
    smallest = search.token_bytes("token_bytes")
    for _ in range(TRIES):
        within = limits
        if speed < least:
            if read <= smallest:
                break
            read = max(smallest, int(read * speed / least))
            within = replace(limits, token_bytes=min(read, limits.token_bytes or read))
        choices = search.choices(within)
        model = compile_model(choices)
        speed, read = measure(model), choices.token_bytes
        if speed >= least:
            return FastChoice(choices, model, speed)
        fastest = max(fastest, speed)
    raise UsageError(
        f"of what was compiled and measured, the fastest writes {fastest:.3g} tokens a second, and "
        f"the limit is {least:.3g}: allow fewer, name smaller formats, or more moves"
    )
