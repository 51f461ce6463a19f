"""Text to tokens and back, with the tokenizer that the artifact carries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moec.errors import ArtifactError, UsageError

FOLDER = "tokenizer/"


@dataclass(frozen=True)
class Tokenizer:
    """`stop` are the tokens that end a text."""

    tokenizer: Any
    stop: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Raises UsageError where the text is no Unicode, or gives no token at all."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the prompt is not UTF-8 at character {error.start}: convert it first"
            ) from error
        tokens: list[int] = self.tokenizer.encode(text).ids
        if not tokens:
            raise UsageError("the prompt gives no tokens; write at least one character")
        return tokens

    def stream(self, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
        """The text of `tokens` as they come, each piece as soon as its characters are whole."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(ids=prompt, skip_special_tokens=True)
        for token in tokens:
            if piece := decoder.step(self.tokenizer, token):
                yield piece


def load_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer among an artifact's files.

    Raises ArtifactError where there is none or it is malformed, and UsageError where the
    `tokenizers` package is missing.
    """
    content = files.get(FOLDER + "tokenizer.json")
    if content is None:
        raise ArtifactError(
            "the artifact carries no tokenizer; compile a Hugging Face checkpoint folder that has "
            "a tokenizer.json, or give tokens with --input"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError("--prompt needs the package tokenizers; install moec[hf]") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises nothing narrower
        raise ArtifactError(f"{FOLDER}tokenizer.json is malformed: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(tokenizer, _stop(tokenizer, files))


def _stop(tokenizer: Any, files: Mapping[str, bytes]) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        token_ids = _json(files, name).get("eos_token_id")
        if isinstance(token_ids, int):
            return frozenset([token_ids])
        if isinstance(token_ids, list):
            return frozenset(token for token in token_ids if isinstance(token, int))
    token = _json(files, "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    token_ids = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return frozenset() if token_ids is None else frozenset([token_ids])


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(FOLDER + name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{FOLDER}{name} is malformed: {error}") from error
    return content if isinstance(content, dict) else {}
