"""The contenders of a benchmark. Each reads the same prompts, then writes the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moec.errors import SetupError
from moec.inspect.bench.names import TRANSFORMERS, check_names
from moec.runtime.call.executor import Executor
from moec.runtime.text.texts import Texts

Tokens = Sequence[Sequence[int]]


class Session(Protocol):
    """Texts that are being read and written."""

    def feed(self, tokens: Tokens) -> Any:
        """Add tokens to each text; returns the logits [texts, V] after its last token."""


@dataclass(frozen=True)
class Contender:
    name: str
    open: Callable[[int, int], Session]  # (number of texts, room for tokens of each)


def compiled(executor: Executor) -> Contender:
    """moec's contender. Raises UsageError for a model that cannot take tokens in pieces."""
    if executor.package.generation is None:
        raise SetupError(f"the model cannot decode step by step: {executor.package.no_generation}")
    return Contender("moec", lambda texts, room: Texts(executor, texts, room))


@dataclass
class _Transformers:
    """The forward of transformers with its dynamic cache, in inference mode."""

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
    """One contender for each name; all share the weights of the model that `load` returns.

    Raises UsageError for a name that is not in BASELINES.
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
