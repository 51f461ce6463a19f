"""Multiple choice by log likelihood, as lm-evaluation-harness scores it.

A file of tasks has one JSON object a line: `query`, `choices` (texts that may follow it) and `gold`
(the index of the right one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from moec.errors import UsageError
from moec.evaluation.estimate import Estimate
from moec.evaluation.subject import Subject
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular


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
        raise UsageError(f"{path}: {reason(error)}") from error
    tasks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = msgspec.json.decode(line, type=Task)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        if not 0 <= task.gold < len(task.choices):
            raise UsageError(
                f"{path}, line {number}: gold is {task.gold}, and there are "
                f"{len(task.choices)} choices"
            )
        if not task.query or not all(task.choices):
            raise UsageError(f"{path}, line {number}: the query or a choice is empty")
        tasks.append(task)
    if not tasks:
        raise UsageError(f"{path} has no tasks")
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
        raise UsageError(
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
