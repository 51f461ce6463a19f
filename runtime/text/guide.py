"""Texts that keep to a grammar, by llguidance: tokens that cannot go on are not drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from math import lcm
from typing import Any, Protocol

import numpy as np

from moec.errors import InputError, SetupError, first_line
from moec.extras import missing_extra
from moec.runtime.dtypes import Array
from moec.runtime.text.sampling import NoTokenError

NO_TEXT = "NoExtension"  # the reason that the library gives
TOO_LARGE = ("too many", "too big")  # in its words for a grammar beyond LIMITS
LIMITS = {"initial_lexer_fuel": 100_000, "max_lexer_states": 50_000}
"""Of one grammar: 250 bytes each and 1 KB each, so at most 80 MB. `(a{1000}){1000}` takes 250 MB
with the library's own."""


class Guide(Protocol):
    """Where one text is in its grammar."""

    def copy(self) -> Guide:
        """For another text that begins here."""

    def restrict(self, logits: Array) -> Array:
        """Logits f32[V] with -inf for the tokens that cannot come next.

        Raises NoTokenError where there is no other.
        """

    def advance(self, token: int) -> bool:
        """Go on with a token; returns whether the text is complete."""


class Grammars:
    """The grammars of a tokenizer, which `stop` ends the texts of."""

    def __init__(self, tokenizer: Any, stop: Collection[int]) -> None:
        """Raises UsageError where llguidance is missing."""
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise SetupError(missing_extra(error)) from None
        self._library = llguidance
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=sorted(stop) or None)

    def guide(self, response_format: Mapping[str, Any]) -> Guide | None:
        """The beginning of a text of a format: OpenAI's {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"schema": ...}} and {"type": "text"}, or
        {"type": "regex", "regex": ...}.

        Raises InputError for another, and for a grammar that is wrong or too complex.
        """
        if (kind := response_format.get("type")) == "text":
            return None
        new = self._library.LLMatcher
        if kind not in ("regex", "json_object", "json_schema"):
            raise InputError(
                f"response_format has the type {kind!r}: give text, json_object, json_schema or "
                "regex"
            )
        schema = {"type": "object"}
        if kind == "json_schema":
            schema = _field(_field(response_format, "json_schema", Mapping), "schema", Mapping)
            numbers = re.findall(r'"multipleOf": ([\d.e+-]+)', json.dumps(schema))
            digits = (Decimal(n).normalize().as_tuple().digits for n in numbers)
            if lcm(*(int("".join(map(str, d))) for d in digits)) > 100_000:  # a state for each
                raise InputError("response_format: multipleOf: give at most 5 digits")
        options = {"whitespace_flexible": False}  # else blanks without end; a schema may say so
        try:
            if kind == "regex":
                grammar = new.grammar_from_regex(_field(response_format, "regex", str))
            else:
                grammar = new.grammar_from_json_schema(json.dumps(schema), defaults=options)
            matcher = new(self._tokenizer, grammar, log_level=0, limits=self._limits)
            matcher.compute_bitmask()  # takes longest for the first token
        except (ValueError, RecursionError) as error:
            raise InputError(f"response_format: {first_line(error)}") from error
        if matcher.is_error():
            none = matcher.get_error().startswith(NO_TEXT)
            why = "no text of the model's tokens keeps to it" if none else _sentence(matcher)
            raise InputError(f"response_format: {why}")
        return _Matcher(matcher)


def _field(mapping: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(value := mapping.get(name), kind):
        what = "text" if kind is str else "an object"
        raise InputError(f"response_format: {name} is {value!r}; it must be {what}")
    return value


class _Matcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Guide:
        return _Matcher(self._matcher.deep_copy())

    def restrict(self, logits: Array) -> Array:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=len(logits)).astype(bool)
        scores = np.where(allowed, logits, -np.inf)
        if self._matcher.is_error() or np.isneginf(scores).all():
            raise NoTokenError(f"no token fits response_format here: {_sentence(self._matcher)}")
        return scores

    def advance(self, token: int) -> bool:
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


def _sentence(matcher: Any) -> str:
    (error, *_) = str(matcher.get_error()).strip().splitlines() or ["the grammar has no such text"]
    large = any(words in error for words in TOO_LARGE)
    return "the grammar is too large: repeat less, or list less" if large else error
