"""A language model that is evaluated: an artifact, or a checkpoint in eager PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import SetupError
from moec.model.load import load
from moec.runtime.artifact import manifest
from moec.runtime.dtypes import Array
from moec.runtime.package import MAIN
from moec.runtime.text.prompt import Tokenizer, load_tokenizer

Logits = Callable[[Sequence[int]], Array]
"""Tokens [T] -> logits [T, V]."""


@dataclass(eq=False)
class Subject:
    """`longest` is the most tokens of a call, None without a limit, `bytes` are those of the
    weights. `tokens` and `seconds` count the calls so far."""

    name: str
    bytes: int
    tokenizer: Tokenizer
    longest: int | None
    logits: Logits
    tokens: int = 0
    seconds: float = 0.0

    def log_probs(self, tokens: Sequence[int]) -> Array:
        """Log probabilities f32[T, V] of what follows each token.

        Raises UsageError where the model's logits are no numbers.
        """
        start = time.perf_counter()
        logits = np.asarray(self.logits(tokens), np.float32)
        self.seconds += time.perf_counter() - start
        self.tokens += len(tokens)
        logits -= logits.max(-1, keepdims=True)
        result: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        if np.isnan(result).any():
            raise SetupError(f"{self.name} gives logits that are no numbers")
        return result


def open_subject(model: str) -> Subject:
    """The artifact (a file or a folder), checkpoint folder or GGUF file.

    Raises UsageError for what is no language model with a tokenizer, and what `moec.load` and
    `moec.compile` raise.
    """
    path = Path(model)
    compiled = path.suffix == ".moec" or (path / manifest.NAME).is_file()
    return _artifact(path) if compiled else _eager(path)


def _artifact(path: Path) -> Subject:
    model = load(path)
    package = model.artifact.package
    main = package.functions[MAIN]
    if len(main.inputs) != 1 or len(main.outputs) != 1 or len(main.outputs[0].shape) != 3:
        raise SetupError(
            f"{path} gives no logits [B, S, V] for tokens alone: it cannot be evaluated"
        )
    name = main.inputs[0].name

    def logits(tokens: Sequence[int]) -> Array:
        output: Array = model(**{name: np.array([tokens], np.int64)})[0]
        return output

    longest = package.generation.longest if package.generation else None
    parts = model.artifact.manifest.parts
    size = sum(part.size for name, part in parts.items() if name.startswith("weights/"))
    return Subject(path.name, size, model.tokenizer, longest, logits)


def _eager(path: Path) -> Subject:
    import torch

    from moec.capture.doors import open_source

    source = open_source(str(path))
    module: Any = source.model

    def logits(tokens: Sequence[int]) -> Array:
        with torch.inference_mode():
            output = module(input_ids=torch.tensor([tokens]), use_cache=False)
        result: Array = output.logits[0].float().numpy()
        return result

    size = sum(weight.nbytes for weight in {id(w): w for w in module.parameters()}.values())
    longest = getattr(module.config, "max_position_embeddings", None)
    files: Mapping[str, bytes] = source.files
    return Subject(f"{path.name} (eager)", size, load_tokenizer(files), longest, logits)
