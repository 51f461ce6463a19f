"""Those who race: each reads the same prompts, then writes the same tokens, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moec.bench.names import TRANSFORMERS, check_names
from moec.errors import UsageError
from moec.runtime.executor import Executor
from moec.runtime.texts import Texts

Tokens = Sequence[Sequence[int]]


class Session(Protocol):
    """Texts in the middle of being read and written."""

    def feed(self, tokens: Tokens) -> Any:
        """Add tokens to each text; the logits [texts, V] after the last of each."""


@dataclass(frozen=True)
class Contender:
    name: str
    open: Callable[[int, int], Session]  # texts, room for how many tokens each


def compiled(executor: Executor) -> Contender:
    """Raises UsageError for a model that cannot take tokens in pieces."""
    if executor.package.generation is None:
        raise UsageError(f"the model runs no tokens in pieces: {executor.package.no_generation}")
    return Contender("moec", lambda texts, room: Texts(executor, texts, room))


@dataclass
class _Transformers:
    """transformers' own forward with its own dynamic cache, in inference mode."""

    forward: Any
    cache: Any = None

    def feed(self, tokens: Tokens) -> torch.Tensor:
        with torch.inference_mode():
            output = self.forward(
                input_ids=torch.tensor(tokens),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def transformers(names: Sequence[str], load: Callable[[], Any]) -> list[Contender]:
    """One contender for each name; all share the weights of one model that `load` gives.

    Raises UsageError for a name that is none of BASELINES.
    """
    check_names(names)
    if not names:
        return []
    model = load().eval()
    return [_transformer(name, model) for name in names]


def _transformer(name: str, model: Any) -> Contender:
    experts = name if name in TRANSFORMERS else "grouped_mm"
    run = torch.compile(model, dynamic=True) if name == "inductor" else model

    def forward(**inputs: Any) -> Any:
        model.set_experts_implementation(experts)
        return run(**inputs)

    return Contender(name, lambda texts, room: _Transformers(forward))
