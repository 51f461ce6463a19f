"""`generate` and `stream` of a compiled or loaded model."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from moec.errors import ArtifactError, InputError, UsageError
from moec.files.printable import preformatted
from moec.runtime.text.generate import generate, slow, vocabulary_of
from moec.runtime.text.prompt import Tokenizer
from moec.runtime.text.request import AUTO, BeamOptions, Request
from moec.runtime.text.sampling import Sampling
from moec.runtime.text.speculation.draft import Draft
from moec.runtime.text.texts import Decoder
from moec.runtime.text.write_text import new_texts, write
from moec.spelling import did_you_mean

Prompts: TypeAlias = Any
"""Token ids: a tensor or array [B, S], or a list of ids for each text, of any lengths; or a string,
or a list of strings."""


@dataclass(frozen=True)
class Writer:
    """What is needed to continue texts: the model, and a function that loads its tokenizer."""

    executor: Decoder
    tokenizer: Callable[[], Tokenizer]


def request_of(
    writer: Writer,
    *,
    max_new_tokens: int = 64,
    min_tokens: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    response_format: Mapping[str, Any] | None = None,
    speculate: int | str = AUTO,
    draft: TextModel | None = None,
    stop: int | str | Sequence[int | str] | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
) -> tuple[Request, tuple[str, ...]]:
    """The request, and the strings that end a text. Raises InputError for an option of another type
    or out of range."""
    stops: Any = (stop,) if _is_id(stop) or isinstance(stop, str) else stop
    if stops is not None and not isinstance(stops, Collection):
        raise InputError(f"stop is {stop!r}; it must be a token, a string, or a list of them")
    strings = tuple(item for item in stops or () if isinstance(item, str))
    tokens = [item for item in stops or () if not isinstance(item, str)]
    if not all(map(_is_id, tokens)):
        raise InputError(f"stop is {stop!r}; it must be a token, a string, or a list of them")
    vocabulary = vocabulary_of(writer.executor)
    if outside := [token for token in tokens if not 0 <= token < vocabulary]:
        raise InputError(f"stop: token {outside[0]} is not one of the model's {vocabulary} tokens")
    # strings are used in addition to the model's own tokens
    if not tokens and (stops is None or strings):
        generation = writer.executor.package.generation
        tokens = list(generation.stop) if generation is not None else []
    if not isinstance(logit_bias, Mapping | None):
        raise InputError(f"logit_bias is {logit_bias!r}; it maps token ids to numbers")
    sampling = Sampling(
        temperature, top_p, top_k, seed, min_p, typical_p,
        repetition_penalty, presence_penalty, frequency_penalty, tuple((logit_bias or {}).items()),
    )  # fmt: skip
    if not isinstance(response_format, Mapping | None):
        raise InputError(
            f'response_format is {response_format!r}; such as {{"type": "json_object"}}'
        )
    guide = response_format and writer.tokenizer().grammars.guide(response_format)
    ids = frozenset(map(int, tokens))
    if not isinstance(draft, TextModel | None):
        raise InputError(f"draft is {draft!r}; give a model: moec.load(path)")
    beams = BeamOptions(num_beams, length_penalty, early_stopping, num_return_sequences)
    beams.check_alone([f"stop {strings[0]!r}"] if strings else [])
    request = Request(
        max_new_tokens, sampling, ids, least=min_tokens, guide=guide or None, speculate=speculate,
        draft=None if draft is None else draft_of(writer, draft._writer), beams=beams,
    )  # fmt: skip
    return request, strings


def draft_of(writer: Writer, small: Writer) -> Draft:
    """The model `small` as the draft of another. Raises InputError where it cannot guess for it:
    their tokens differ, or it goes on with no text."""
    generation = writer.executor.package.generation
    if generation is None:
        raise InputError(
            f"a draft is of no use without a KV cache: {writer.executor.package.no_generation}"
        )
    draft = Draft(small.executor, generation.vocabulary)
    try:
        first, second = (each.tokenizer().tokenizer.get_vocab() for each in (writer, small))
    except ArtifactError:  # there is no text, only token ids
        return draft
    if first != second:
        raise InputError("the draft has another tokenizer than the model: take one with the same")
    return draft


OPTIONS = tuple(inspect.signature(request_of).parameters.values())[1:]
F = TypeVar("F", bound=Callable[..., Any])


def with_options(method: F) -> F:
    """A method whose signature shows the options of `request_of`, for help() and editors."""
    signature = inspect.signature(method)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    method.__signature__ = signature.replace(parameters=[*named, *OPTIONS])  # type: ignore[attr-defined]
    return method


class TextModel:
    """The methods of a model that continues texts."""

    @property
    def _writer(self) -> Writer:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return preformatted(repr(self))

    @with_options
    def generate(self, prompts: Prompts, **options: Any) -> Any:
        """Continue texts. `prompts` are a string or a list of strings, where the model has a
        tokenizer; or token ids [B, S], or a list of lists of ids of any lengths.

        Returns the prompts with their continuations, in the same form; a row that ended early is
        filled up with its last token. `temperature` 0 takes the likeliest token; `stop` are the
        tokens that end a text (default: those of the model's configuration), of which none is among
        the first `min_tokens`, and, for text, strings that end it and are left out.
        `response_format` is a grammar that the text keeps to, as in `moec.runtime.text.guide`.
        `speculate` is how many tokens are guessed and verified at a time, "off", or "auto", where
        that is measured to pay; it changes no token. They are guesses of the model `draft`, if
        there is one, or of what the text repeats. With `num_beams` above 1 the likeliest text is
        searched, see `moec.runtime.text.request.BeamOptions`; the best `num_return_sequences` of
        each prompt come one after the other. The others are those of
        `moec.runtime.text.sampling.Sampling`.

        Raises InputError where the model does not continue text, or an option or a prompt is out of
        range; ArtifactError for text without a tokenizer.
        """
        return continued(self._writer, prompts, **options)

    @with_options
    def stream(self, prompts: Prompts, **options: Any) -> Iterator[Any]:
        """As `generate`, but yields as tokens are computed: the next token of each text, or None
        where it has ended. For a string, yields its pieces; for a list of strings, the next piece
        of each. Not for beams, which are no text before the search ends."""
        if options.get("num_beams", 1) != 1:
            what = f"num_beams is {options['num_beams']!r}, and stream yields tokens as they come"
            raise InputError(f"{what}: use generate")
        return stream(self._writer, prompts, **options)


def continued(writer: Writer, prompts: Prompts, **options: Any) -> Any:
    """The prompts with their continuations: text for text, lists for lists, else a tensor or array
    [B, S + N] like the prompts. A row that ended early is filled up with the token that ended it,
    or its last token."""
    if strings := _strings(prompts):
        pieces = zip(*_written(writer, strings, options), strict=True)
        additions = list(map("".join, pieces))
        each = len(additions) // len(strings)
        complete = [strings[n // each] + text for n, text in enumerate(additions)]
        return complete[0] if isinstance(prompts, str) and each == 1 else complete
    texts = texts_of(prompts)
    columns = [*zip(*stream(writer, texts, **options), strict=True)]
    each = len(columns) // len(texts)
    results = [
        texts[n // each] + [token for token in column if token is not None]
        for n, column in enumerate(columns)
    ]
    if isinstance(prompts, list | tuple):
        return results
    most = max(map(len, results))
    filled = np.array([text + [text[-1]] * (most - len(text)) for text in results], np.int64)
    torch = sys.modules.get("torch")
    is_torch = torch is not None and isinstance(prompts, torch.Tensor)
    return torch.from_numpy(filled) if torch is not None and is_torch else filled


def stream(writer: Writer, prompts: Prompts, **options: Any) -> Iterator[Any]:
    """The next token of each text as it is computed, None for a text that has ended; for strings
    the next piece of each, for one string its pieces."""
    if strings := _strings(prompts):
        pieces = _written(writer, strings, options)
        return (piece for (piece,) in pieces if piece) if isinstance(prompts, str) else pieces
    request, stops = _checked(writer, options)
    if stops:
        raise InputError(f"stop is {stops[0]!r}: a string ends prompts that are text, not tokens")
    return generate(writer.executor, texts_of(prompts), request)


def _checked(writer: Writer, options: Mapping[str, Any]) -> tuple[Request, tuple[str, ...]]:
    names = [option.name for option in OPTIONS]
    if unknown := [name for name in options if name not in names]:
        near = did_you_mean(unknown[0], names) or f"; the options are {', '.join(names)}"
        raise UsageError(f"text is generated without an option {unknown[0]!r}{near}")
    checked = request_of(writer, **options)
    if why := slow(writer.executor):
        warnings.warn(
            f"slow: each new token processes the whole text again, as there is no KV cache: {why}",
            stacklevel=4,
        )
    return checked


def _strings(prompts: Prompts) -> list[str]:
    """The prompts where they are text; empty where they are tokens."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, list | tuple) and all(isinstance(p, str) for p in prompts):
        return list(prompts)
    return []


def _written(
    writer: Writer, prompts: Sequence[str], options: Mapping[str, Any]
) -> Iterator[tuple[str, ...]]:
    request, stops = _checked(writer, options)
    tokenizer = writer.tokenizer()
    if not request.stop and options.get("stop") is None:
        request = replace(request, stop=tokenizer.stop)
    encoded = [t for prompt in prompts for t in [tokenizer.encode(prompt)] * request.beams.returned]
    texts = new_texts(tokenizer, encoded, stops)
    return write(writer.executor, texts, request)


def texts_of(prompts: Prompts) -> list[list[int]]:
    """The prompts as lists of token ids. Raises InputError where they are not token ids."""
    if isinstance(prompts, list | tuple):
        rows = list(prompts)
        if rows and all(_is_id(row) for row in rows):
            raise InputError("the prompts are one list of token ids: give a list of such lists")
    elif getattr(prompts, "ndim", None) == 2:
        rows = list(np.asarray(prompts))
    else:
        shape = getattr(prompts, "shape", None)
        what = f"{type(prompts).__name__} {list(shape)}" if shape is not None else repr(prompts)
        raise InputError(
            f"the prompts are a {what}, expected text, token ids [B, S], or a list of lists of them"
        )
    return [_text(row, number) for number, row in enumerate(rows)]


def _text(row: Any, number: int) -> list[int]:
    ids = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(ids, list | tuple) or not all(_is_id(token) for token in ids):
        raise InputError(f"prompt {number} is {row!r}, expected a list of token ids")
    return [int(token) for token in ids]


def _is_id(token: Any) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)
