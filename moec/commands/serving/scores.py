"""The log probabilities of tokens, as the two kinds of answers hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moec.runtime.text.sampling import Logprobs

LEAST = -9999.0  # of a token without probability, as JSON has no infinity

Bytes = Callable[[int], bytes]
"""The bytes of a token."""


@dataclass(frozen=True)
class Score:
    """A token of a text, and where it begins, in characters."""

    token: int
    logprobs: Logprobs | None  # None: of the first token of a prompt
    offset: int


def of_chat(scores: Sequence[Score], bytes_of: Bytes) -> dict[str, Any]:
    content = []
    for score in scores:
        assert score.logprobs is not None  # chats are not echoed
        chosen = _token(score.token, score.logprobs.logprob, bytes_of)
        top = [_token(token, logprob, bytes_of) for token, logprob in score.logprobs.top]
        content.append({**chosen, "top_logprobs": top})
    return {"content": content, "refusal": None}


def of_completion(scores: Sequence[Score], bytes_of: Bytes) -> dict[str, Any]:
    """Of likeliest tokens with the same text, which bytes alone would tell apart, the first."""
    return {
        "tokens": [_text(bytes_of(score.token)) for score in scores],
        "token_logprobs": [s.logprobs and max(s.logprobs.logprob, LEAST) for s in scores],
        "top_logprobs": [
            s.logprobs and {_text(bytes_of(t)): max(p, LEAST) for t, p in reversed(s.logprobs.top)}
            for s in scores
        ],
        "text_offset": [score.offset for score in scores],
    }


def _token(token: int, logprob: float, bytes_of: Bytes) -> dict[str, Any]:
    content = bytes_of(token)
    return {"token": _text(content), "logprob": max(logprob, LEAST), "bytes": [*content]}


def _text(content: bytes) -> str:
    return content.decode(errors="replace")
