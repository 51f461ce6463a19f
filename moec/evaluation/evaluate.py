"""`moec.evaluate`: several models on one text and on tasks, as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moec.errors import UsageError
from moec.evaluation.estimate import Z95
from moec.evaluation.subject import Subject, open_subject
from moec.evaluation.tasks import TaskScore, read_tasks, score_tasks
from moec.evaluation.text import TextScore, score_text
from moec.files.printable import columns, preformatted
from moec.report.units import counted, size


@dataclass(frozen=True)
class ModelScore:
    """`bytes` are those of the weights; `tokens_per_second` those that the evaluation read, one
    text after the other."""

    name: str
    bytes: int
    tokens_per_second: float
    text: TextScore | None
    tasks: TaskScore | None


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The first of `models` is the reference. A text is read in windows of `window` tokens, of
    which the last `stride` are counted (all, in the first window)."""

    models: tuple[ModelScore, ...]
    window: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        models = [
            asdict(model) | {"text": model.text.to_dict() if model.text else None}
            for model in self.models
        ]
        content = {"window": self.window, "stride": self.stride, "models": models}
        return {name: _finite(value) for name, value in content.items()}

    def __str__(self) -> str:
        head = ("model", "weights", "tokens/s", "perplexity", "bits/byte", "KL", "same top-1")
        texts, tasks = (any(getattr(m, n) for m in self.models) for n in ("text", "tasks"))
        shown = [*head[: 7 if texts else 3], *(("accuracy", "a byte") if tasks else ())]
        rows = [tuple(shown), *(_row(model, texts, tasks) for model in self.models)]
        lines = [line.rstrip() for line in columns(rows)]
        about = []
        if texts:
            predicted = max(m.text.predicted for m in self.models if m.text)
            about.append(
                f"{predicted:,} tokens in windows of {self.window}, {self.stride} apart; "
                "KL and top-1 against the first model"
            )
        if tasks:
            about.append(counted(max(m.tasks.tasks for m in self.models if m.tasks), "task"))
        return "\n".join([*lines, "", "; ".join(about) + "; ± is half of a 95 % interval"]) + "\n"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return preformatted(str(self))


def _finite(value: Any) -> Any:
    """Without numbers that JSON has not, such as the error of one window: None."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _row(model: ModelScore, texts: bool, tasks: bool) -> tuple[str, ...]:
    cells = [model.name, size(model.bytes), f"{model.tokens_per_second:,.0f}"]
    if texts:
        text = model.text
        assert text is not None
        error = text.perplexity_error
        spread = "" if math.isnan(error) else f" ± {Z95 * error:.3f}"
        cells += [f"{text.perplexity:.3f}{spread}", f"{text.bits_per_byte:.4f}"]
        cells += [text.kl.shown(".2e") if text.kl else "-"]
        cells += [text.agreement.shown(".3f") if text.agreement else "-"]
    if tasks:
        score = model.tasks
        assert score is not None
        cells += [score.accuracy.shown(".3f"), score.accuracy_norm.shown(".3f")]
    return tuple(cells)


def evaluate(
    models: Sequence[str | Path],
    text: str | None = None,
    tasks: str | Path | None = None,
    *,
    window: int = 512,
    stride: int | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> Evaluation:
    """Evaluate artifacts, checkpoint folders and GGUF files (in eager PyTorch); the first one is
    the reference. `text` is the text itself, `tasks` the path of a JSONL file (`tasks.py`);
    `stride` is half of the window by default.

    Raises UsageError where there is nothing to evaluate, a number is too small, or a file is
    malformed, and what opening the models raises.
    """
    if not models or (text is None and tasks is None):
        raise UsageError("an evaluation needs models, and a text, tasks, or both")
    stride = max(1, window // 2) if stride is None else stride
    if window < 2 or not 1 <= stride < window:
        raise UsageError(
            f"window is {window} and stride {stride}: the stride is from 1 to the window less one"
        )
    questions = None if tasks is None else read_tasks(Path(tasks))
    subjects: list[Subject] = []
    for model in models:
        progress(f"open {model}")
        subjects.append(open_subject(str(model)))
    scores: Sequence[TextScore | None] = [None] * len(subjects)
    if text is not None:
        scores = score_text(subjects, text, window, stride, progress)
    results = []
    for subject, score in zip(subjects, scores, strict=True):
        answers = None if questions is None else score_tasks(subject, questions, progress)
        speed = subject.tokens / subject.seconds if subject.seconds else 0.0
        results.append(ModelScore(subject.name, subject.bytes, speed, score, answers))
    return Evaluation(tuple(results), window, stride)
