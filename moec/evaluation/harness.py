"""A model of moec for lm-evaluation-harness, whose package `lm_eval` this module needs.

import lm_eval
from moec.evaluation.harness import HarnessModel
lm_eval.simple_evaluate(model=HarnessModel("out.moec"), tasks=["arc_easy"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moec.evaluation.subject import open_subject
from moec.evaluation.tasks import likelihood_of_tokens, log_likelihood
from moec.model.load import load


class HarnessModel(LM):  # type: ignore[misc]
    """The artifact at `path`. Texts are scored one after the other."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self._path, self._subject = Path(path), open_subject(str(path))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of (context, continuation) each; an empty context is the token before any text."""
        return [log_likelihood(self._subject, *request.args) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of whole texts, after one of the tokens that end a text."""
        return [self._rolling(request.args[0]) for request in requests]

    def _rolling(self, text: str) -> float:
        """In the package's windows."""
        tokenizer = self._subject.tokenizer
        tokens = tokenizer.encode(text)
        end = min(tokenizer.stop, default=tokens[0])
        length = self._subject.longest or len(tokens)
        rolling = get_rolling_token_windows(tokens, end, max_seq_len=length, context_len=1)
        parts = map(make_disjoint_window, rolling)
        return sum(likelihood_of_tokens(self._subject, *part)[0] for part in parts)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations of (context, options): `until`, `max_gen_toks`, `temperature`, `top_p`."""
        model = load(self._path)
        generation = model.artifact.package.generation
        ends = [*(generation.stop if generation else ()), *model.tokenizer.stop]
        texts = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or ()
            sampled = options.get("do_sample", bool(options.get("temperature")))
            text: str = model.generate(
                context,
                max_new_tokens=options.get("max_gen_toks", 256),
                stop=[*ends, *([until] if isinstance(until, str) else until)],
                temperature=options.get("temperature", 1.0) if sampled else 0.0,
                top_p=options.get("top_p", 1.0) if sampled else 1.0,
            )
            texts.append(text.removeprefix(context))
        return texts
