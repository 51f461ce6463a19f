"""Runs a model on a workload again and again: as it always runs, and with a clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.errors import SetupError, UsageError
from moec.runtime.call.profile import TimedCall, TimedDecoder, decoders
from moec.runtime.package import DECODE, MAIN, Package
from moec.runtime.text.texts import Texts

Run = tuple[TimedCall, ...]
"""Calls whose times are added: the pieces of a prompt, or one step."""


@dataclass(frozen=True, eq=False)
class TimedPhase:
    """Repetitions of the same work by a `function`: without a clock, with one, and with the
    arguments of kernels."""

    name: str
    function: str
    plain: tuple[Run, ...]
    timed: tuple[Run, ...]
    watched: tuple[Run, ...]


@dataclass(frozen=True)
class ProfiledTexts:
    """`prompts` of one length, then `new` tokens for each text, one at a time: `follow`, or the
    likeliest ones."""

    prompts: Sequence[Sequence[int]]
    new: int
    follow: Sequence[Sequence[int]] = ()


def random_tokens(package: Package, batch: int, prompt: int, new: int) -> ProfiledTexts:
    """Raises UsageError where the texts are longer than the model allows."""
    generation = package.generation
    if generation is None:
        raise SetupError(
            f"the model does not continue text ({package.no_generation}): profile a call of it, "
            "with inputs (-i FILE)"
        )
    if generation.longest is not None and prompt + new > generation.longest:
        raise UsageError(
            f"{prompt} + {new} tokens are requested, and the model takes at most "
            f"{generation.longest}: give smaller numbers"
        )
    draw = np.random.default_rng(0).integers
    prompts = draw(generation.vocabulary, size=(batch, prompt)).tolist()
    return ProfiledTexts(prompts, new, draw(generation.vocabulary, size=(new, batch)).tolist())


def record_text(
    package: Package, load: ProfiledTexts, rounds: int, progress: Callable[[str], None]
) -> tuple[TimedPhase, ...]:
    """The phases prefill and decode."""
    plain, timed, watched = decoders(package)
    progress("warm up")
    follow = load.follow or _greedy(plain, load)
    slow = _session(watched, load, follow)
    _session(timed, load, follow)
    sessions = []
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        sessions.append((_session(plain, load, follow), _session(timed, load, follow)))
    prefills = [(a[0], b[0]) for a, b in sessions]
    steps = [pair for a, b in sessions for pair in zip(a[1:], b[1:], strict=True)]
    return _phase("prefill", DECODE, prefills, slow[:1]), _phase("decode", DECODE, steps, slow[1:])


def record_call(
    package: Package, inputs: Mapping[str, Any], rounds: int, progress: Callable[[str], None]
) -> tuple[TimedPhase, ...]:
    """The phase call: `main`, from its initial states."""
    plain, timed, watched = decoders(package)

    def call(decoder: TimedDecoder) -> Run:
        decoder.executor.reset()
        decoder.calls.clear()
        decoder(inputs)
        return tuple(decoder.calls)

    progress("warm up")
    call(plain), call(timed)
    slow, runs = call(watched), []
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        runs.append((call(plain), call(timed)))
    return (_phase("call", MAIN, runs, [slow]),)


def _phase(
    name: str, function: str, runs: Sequence[tuple[Run, Run]], watched: Sequence[Run]
) -> TimedPhase:
    plain, timed = zip(*runs, strict=True)
    return TimedPhase(name, function, plain, timed, tuple(watched))


def _greedy(decoder: TimedDecoder, load: ProfiledTexts) -> list[list[int]]:
    """The likeliest next tokens of each step."""
    texts = Texts(decoder, len(load.prompts), len(load.prompts[0]) + load.new)
    logits, follow = texts.feed(load.prompts), []
    for _ in range(load.new):
        follow.append(logits.argmax(-1).tolist())
        logits = texts.feed([[token] for token in follow[-1]])
    return follow


def _session(
    decoder: TimedDecoder, load: ProfiledTexts, follow: Sequence[Sequence[int]]
) -> list[Run]:
    """The prompts, then each step."""
    texts = Texts(decoder, len(load.prompts), len(load.prompts[0]) + load.new)
    runs = []
    for tokens in (load.prompts, *([[token] for token in step] for step in follow)):
        decoder.calls.clear()
        texts.feed(tokens)
        runs.append(tuple(decoder.calls))
    return runs
