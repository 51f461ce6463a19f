"""`moec.evaluate`: several models on one text and on tasks, as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.printable import columns, preformatted
from moec.files.regular_file import read_regular
from moec.optimise.evaluation.subject import Subject, open_subject
from moec.report.units import counted, size
from moec.runtime.dtypes import Array

Z95 = 1.96
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """`error` is the standard error; NaN for one sample."""

    mean: float
    error: float

    @staticmethod
    def of(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
        """The mean of all numbers, of which each sample has a sum and a count; samples are taken as
        independent, numbers within one are not (a ratio estimator, Cochran 1977, 2.11)."""
        total, count, samples = float(np.sum(sums)), int(np.sum(counts)), len(sums)
        mean = total / count
        if samples < 2:
            return Estimate(mean, math.nan)
        residuals = np.asarray(sums) - mean * np.asarray(counts)
        variance = float((residuals**2).sum()) * samples / (samples - 1)
        return Estimate(mean, math.sqrt(variance) / count)

    def shown(self, form: str = ".4f") -> str:
        """With half of the 95 % interval."""
        spread = "" if math.isnan(self.error) else f" ± {Z95 * self.error:{form}}"
        return f"{self.mean:{form}}{spread}"


Progress = Callable[[str], None]


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a text; those from `first` on are predicted and counted."""

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class TextScore:
    """`nats` is the mean negative log likelihood of a token; against the reference: `kl` its
    divergence in nats a token, `agreement` the share of tokens whose likeliest token is the same.
    `bits_per_byte` compares models with different tokenizers."""

    nats: Estimate
    bits_per_byte: float
    predicted: int
    kl: Estimate | None = None
    agreement: Estimate | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats.mean, 700.0))

    @property
    def perplexity_error(self) -> float:
        """The standard error, by the delta method."""
        return self.perplexity * self.nats.error

    def to_dict(self) -> dict[str, Any]:
        return {"perplexity": self.perplexity, "perplexity_error": self.perplexity_error} | asdict(
            self
        )


def windows(count: int, length: int, stride: int) -> list[Window]:
    """Windows over `count` tokens, each `stride` after the one before. Each token but the first is
    counted once, in the first window that has it: with a stride below the length, after at least
    length - stride others."""
    ends = [min(length, count)]
    while ends[-1] < count:
        ends.append(min(ends[-1] + stride, count))
    firsts = [1, *ends[:-1]]
    return [
        Window(max(0, end - length), first, end) for first, end in zip(firsts, ends, strict=True)
    ]


def score_text(
    subjects: Sequence[Subject],
    text: str,
    length: int,
    stride: int,
    progress: Progress = lambda phase: None,
) -> list[TextScore]:
    """The scores of all models on one text; the first is the reference of those with its tokens.

    Raises UsageError where the text has fewer than two tokens, or a model takes no such windows.
    """
    for subject in subjects:
        if subject.longest is not None and length > subject.longest:
            raise UsageError(
                f"{subject.name} takes at most {subject.longest} tokens: give a shorter window"
            )
    tokens = [subject.tokenizer.encode(text) for subject in subjects]
    if min(map(len, tokens)) < 2:
        raise SetupError("the text has fewer than two tokens: there is nothing to predict")
    same = [each == tokens[0] for each in tokens]
    sums: list[list[tuple[float, float, float, int]]] = [[] for _ in subjects]
    most = max(len(windows(len(each), length, stride)) for each in tokens)
    for number in range(most):
        progress(f"window {number + 1} of {most}")
        reference: Array | None = None
        for index, subject in enumerate(subjects):
            parts = windows(len(tokens[index]), length, stride)
            if number >= len(parts):
                continue
            part, ids = parts[number], tokens[index]
            scores = subject.log_probs(ids[part.start : part.end])
            scores = scores[part.first - part.start - 1 : -1]
            reference = scores if index == 0 else reference
            against = reference if same[index] and index else None
            sums[index].append(_sums(scores, ids[part.first : part.end], against))
    size = len(text.encode())
    return [_score(rows, size, bool(n) and same[n]) for n, rows in enumerate(sums)]


def _sums(
    scores: Array, follow: Sequence[int], reference: Array | None
) -> tuple[float, float, float, int]:
    """Nats, KL, agreements and number of tokens of a window."""
    if max(follow, default=0) >= scores.shape[-1]:
        raise SetupError("the tokenizer has tokens that the model does not")
    nats = -float(scores[np.arange(len(follow)), follow].sum(dtype=np.float64))
    if reference is None:
        return nats, 0.0, 0.0, len(follow)
    if reference.shape != scores.shape:
        raise SetupError("the models have vocabularies of different sizes")
    possible = reference > -np.inf  # others add nothing; 0 * -inf is NaN
    terms = np.exp(reference[possible]) * (reference[possible] - scores[possible])
    equal = reference.argmax(-1) == scores.argmax(-1)
    return nats, float(terms.sum(dtype=np.float64)), float(equal.sum()), len(follow)


def _score(rows: Sequence[tuple[float, float, float, int]], size: int, compared: bool) -> TextScore:
    nats, kl, equal, counts = zip(*rows, strict=True)
    total = Estimate.of(nats, counts)
    bits = sum(nats) / math.log(2) / size
    if not compared:
        return TextScore(total, bits, sum(counts))
    return TextScore(total, bits, sum(counts), Estimate.of(kl, counts), Estimate.of(equal, counts))


# Multiple choice by log likelihood, as lm-evaluation-harness scores it.
#
# A file of tasks has one JSON object a line: `query`, `choices` (texts that may follow it) and
# `gold` (the index of the right one).


class Task(msgspec.Struct, frozen=True):
    """`gold` is an index of `choices`."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TaskScore:
    """The share of tasks whose right choice has the greatest log likelihood (`accuracy`), and the
    greatest one a byte (`accuracy_norm`)."""

    accuracy: Estimate
    accuracy_norm: Estimate
    tasks: int


def read_tasks(path: Path) -> list[Task]:
    """Raises UsageError, with the line, where one is malformed."""
    try:
        lines = read_regular(path).splitlines()
    except OSError as error:
        raise SetupError(f"{path}: {reason(error)}") from error
    tasks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = msgspec.json.decode(line, type=Task)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise SetupError(f"{path}, line {number}: {error}") from error
        if not 0 <= task.gold < len(task.choices):
            raise SetupError(
                f"{path}, line {number}: gold is {task.gold}, and there are "
                f"{len(task.choices)} choices"
            )
        if not task.query or not all(task.choices):
            raise SetupError(f"{path}, line {number}: the query or a choice is empty")
        tasks.append(task)
    if not tasks:
        raise SetupError(f"{path} has no tasks")
    return tasks


def score_tasks(
    subject: Subject, tasks: Sequence[Task], progress: Callable[[str], None] = lambda phase: None
) -> TaskScore:
    """Raises UsageError where a task is longer than the model takes."""
    right, right_norm = [], []
    for number, task in enumerate(tasks):
        progress(f"{subject.name}: task {number + 1} of {len(tasks)}")
        scores = np.array([log_likelihood(subject, task.query, c)[0] for c in task.choices])
        sizes = np.array([len(choice.encode()) for choice in task.choices])
        right.append(float(scores.argmax() == task.gold))
        right_norm.append(float((scores / sizes).argmax() == task.gold))
    ones = [1] * len(tasks)
    return TaskScore(Estimate.of(right, ones), Estimate.of(right_norm, ones), len(tasks))


def log_likelihood(subject: Subject, context: str, continuation: str) -> tuple[float, bool]:
    """The log likelihood of a continuation, and whether each of its tokens is the likeliest one.

    Tokens are split as lm-evaluation-harness does: those of the context, then those that both texts
    together have beyond their number. Blanks at the end of the context belong to the continuation.
    Without a context, one of the tokens that end a text is before it, or, if there is none, its
    first token is not counted. Raises UsageError where not even the continuation fits the model.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    together = subject.tokenizer.encode(context + continuation)
    before = subject.tokenizer.encode(context) if context else sorted(subject.tokenizer.stop)[:1]
    follow = together[len(before) if context else 0 :]
    before, follow = (before, follow) if before else (follow[:1], follow[1:])
    if not 1 <= len(follow) <= (subject.longest or len(follow)):
        raise SetupError(
            f"{continuation[:40]!r} is {len(follow)} tokens after its query: give 1 to "
            f"{subject.longest}, as {subject.name} takes"
        )
    return likelihood_of_tokens(subject, before, follow)


def likelihood_of_tokens(
    subject: Subject, context: Sequence[int], follow: Sequence[int]
) -> tuple[float, bool]:
    """As `log_likelihood`, of tokens; a context that is too long loses its beginning."""
    read = [*context, *follow][:-1]
    scores = subject.log_probs(read[-(subject.longest or len(read)) :])[-len(follow) :]
    each = scores[np.arange(len(follow)), follow]
    return float(each.sum(dtype=np.float64)), bool((scores.argmax(-1) == follow).all())


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
