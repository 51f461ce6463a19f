"""Text generation with a tokenizer: new tokens are decoded to text as they are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from moec.errors import InputError
from moec.runtime.text.generate import generate
from moec.runtime.text.prompt import Tokenizer
from moec.runtime.text.request import Request
from moec.runtime.text.texts import Decoder


@dataclass
class StopCut:
    """Cuts a stream of text before the first of some strings. Text that may be the beginning of
    such a string is held back until that is decided. Takes time linear in text and strings (Knuth,
    Morris and Pratt 1977)."""

    stops: tuple[str, ...] = ()
    ended: bool = False
    held: str = ""

    def __post_init__(self) -> None:
        for stop in self.stops:
            if not isinstance(stop, str) or not stop:
                raise InputError(f"stop holds {stop!r}: each must be a string")
        self._borders = [_borders(stop) for stop in self.stops]
        self._matched = [0] * len(self.stops)  # characters of each that the text ends with

    def feed(self, piece: str) -> str:
        """Add a piece. Returns the text that is certainly part of the result."""
        text, starts = self.held + piece, list[int]()
        for number, (stop, borders) in enumerate(zip(self.stops, self._borders, strict=True)):
            matched = self._matched[number]
            for end, character in enumerate(piece, len(self.held) + 1):
                while matched and stop[matched] != character:
                    matched = borders[matched]
                matched += stop[matched] == character
                if matched == len(stop):
                    starts.append(end - matched)
                    break
            self._matched[number] = matched
        if starts:
            self.ended, self.held = True, ""
            return text[: min(starts)]
        most = max(self._matched, default=0)
        self.held = text[len(text) - most :]
        return text[: len(text) - most]

    def flush(self) -> str:
        """The text that was held back, after a text has ended without a stop string."""
        rest, self.held = self.held, ""
        return rest


def _borders(stop: str) -> list[int]:
    """For each number of first characters, how many of them, but not all, they also end with."""
    borders, matched = [0, 0], 0
    for character in stop[1:]:
        while matched and stop[matched] != character:
            matched = borders[matched]
        matched += stop[matched] == character
        borders.append(matched)
    return borders


@dataclass
class Text:
    """One text: the tokens of its prompt, the decoder of its new tokens, and the tokens and
    characters so far."""

    prompt: Sequence[int]
    decode: Callable[[int], str]
    cut: StopCut = field(default_factory=StopCut)
    tokens: list[int] = field(default_factory=list)
    written: str = ""

    def add(self, token: int | None, stop: frozenset[int]) -> str:
        """The text that becomes certain with one more token; empty if its characters are
        incomplete, or the text has ended."""
        if self.cut.ended or token is None or token in stop:
            return self.end()
        self.tokens.append(token)
        return self._written(self.cut.feed(self.decode(token)))

    def end(self) -> str:
        """The text that was held back."""
        self.cut.ended = True
        return self._written(self.cut.flush())

    def _written(self, piece: str) -> str:
        self.written += piece
        return piece


def write(executor: Decoder, texts: Sequence[Text], request: Request) -> Iterator[tuple[str, ...]]:
    """Iterates over the next pieces of all texts until all have ended.

    A text ends before a stop token or stop string, after `request.most` tokens, or at the model's
    greatest length. Where several sequences of a prompt are returned, there is a text for each.
    Raises InputError as `generate`.
    """
    prompts = [text.prompt for text in texts[:: request.beams.returned]]
    for drawn in generate(executor, prompts, request):
        yield tuple(t.add(token, request.stop) for t, token in zip(texts, drawn, strict=True))
        if all(text.cut.ended for text in texts):
            return
    yield tuple(text.end() for text in texts)


def new_texts(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[str] = (),
    special: bool = False,
) -> list[Text]:
    """Texts that begin with the tokens of a prompt each, and end at the first of some strings. With
    `special`, they show special tokens."""
    decoders = [tokenizer.decoder(prompt, special) for prompt in prompts]
    return [Text(p, d, StopCut(tuple(stops))) for p, d in zip(prompts, decoders, strict=True)]
