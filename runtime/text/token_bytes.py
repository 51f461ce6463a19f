"""The bytes of single tokens, which may be parts of characters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

SPACE = "\u2581"  # a space in the tokens of SentencePiece


def bytes_of(tokenizer: Any) -> Callable[[int], bytes]:
    """A function from an id to the bytes of its token, for a `tokenizers.Tokenizer`.

    Tokens are written in one of three ways: each byte as a printable character (byte-level BPE of
    GPT-2), with spaces as U+2581 and single bytes as <0x0A> (SentencePiece), or as plain text.
    Added tokens are plain text in all. An id without a token has no bytes.
    """
    content = json.loads(tokenizer.to_str())
    added: dict[int, bytes] = {
        item["id"]: item["content"].encode() for item in content["added_tokens"]
    }
    decoder = json.dumps(content.get("decoder"))
    by_byte = _byte_characters() if '"ByteLevel"' in decoder else {}

    @cache
    def bytes_of_token(token: int) -> bytes:
        if token in added:
            return added[token]
        text: str = tokenizer.id_to_token(token) or ""
        if by_byte and all(character in by_byte for character in text):
            return bytes(by_byte[character] for character in text)
        if single := re.fullmatch("<0x([0-9A-F]{2})>", text):
            return bytes([int(single[1], 16)])
        return text.replace(SPACE, " ").encode()

    return bytes_of_token


def _byte_characters() -> dict[str, int]:
    """The byte of each character of a byte-level token: printable ones of Latin-1 for
    themselves, and the characters from U+0100 on for the others, in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
