"""Multiple choice, counted by hand on a bigram model of characters."""

from __future__ import annotations

import json

import pytest
import torch

from moec.errors import UsageError
from moec.optimise.evaluation.evaluate import Task, log_likelihood, read_tasks, score_tasks
from tests.optimise.evaluation.test_text import TABLE, subject


def by_hand(text: str, count: int) -> float:
    """Of the last characters."""
    ids = [ord(c) for c in text]
    scores = torch.tensor(TABLE[0])[ids[:-1]].log_softmax(-1)
    return float(sum(scores[n, ids[n + 1]] for n in range(len(ids) - 1 - count, len(ids) - 1)))


def test_a_continuation():
    assert log_likelihood(subject(), "ab", "cd")[0] == pytest.approx(by_hand("abcd", 2), rel=1e-5)


def test_blanks_before_it_belong_to_it():
    expected = by_hand("ab cd", 3)
    assert log_likelihood(subject(), "ab ", "cd")[0] == pytest.approx(expected, rel=1e-5)


def test_without_context_the_first_token_is_free():
    assert log_likelihood(subject(), "", "abc")[0] == pytest.approx(by_hand("abc", 2), rel=1e-5)
    after_end = log_likelihood(subject(stop={ord("\n")}), "", "abc")[0]
    assert after_end == pytest.approx(by_hand("\nabc", 3), rel=1e-5)


def test_tokens_are_split_as_the_harness_splits_them():
    """Of "abcd", read as ab and cd; the context "abc" is read as ab and c."""
    model = subject()
    pairs = {"abcd": [65, 66], "abc": [65, 67]}
    model.tokenizer.encode = pairs.__getitem__
    model.tokenizer.stop = ()
    with pytest.raises(UsageError, match="is 0 tokens after its query"):
        log_likelihood(model, "abc", "d")
    pairs["abcde"] = [65, 66, 68]
    expected = torch.tensor(TABLE[0])[67].log_softmax(-1)[68]
    assert log_likelihood(model, "abc", "de")[0] == pytest.approx(float(expected), rel=1e-5)


def test_the_beginning_of_a_long_query_is_left_out():
    cut = log_likelihood(subject(longest=4), "many words", "cd")
    assert cut == log_likelihood(subject(), "many words", "cd")
    with pytest.raises(
        UsageError, match="is 5 tokens after its query: give 1 to 4, as bigram 0 takes"
    ):
        log_likelihood(subject(longest=4), "a", "bcdef")


def test_whether_each_token_is_the_likeliest():
    likely = chr(int(TABLE[0][ord("a")].argmax()))
    assert log_likelihood(subject(), "a", likely)[1]
    assert not log_likelihood(subject(), "a", "a" if likely != "a" else "b")[1]


def test_accuracy_and_accuracy_a_byte():
    """A long choice has a lower likelihood, and may have a greater one a byte."""
    tasks = [Task("ab", ("c", "cdefgh"), gold) for gold in (0, 1)]
    scores = [by_hand("abc", 1), by_hand("abcdefgh", 6)]
    assert scores[0] > scores[1]
    assert scores[0] < scores[1] / 6
    score = score_tasks(subject(), [*tasks, tasks[0]])
    assert score.accuracy.mean == pytest.approx(2 / 3)
    assert score.accuracy_norm.mean == pytest.approx(1 / 3)
    assert score.accuracy.error == pytest.approx((2 / 9 / 2) ** 0.5)
    assert score.tasks == 3


def test_files(tmp_path):
    path = tmp_path / "tasks.jsonl"
    line = {"query": "a", "choices": ["b", "c"], "gold": 1, "id": "ignored"}
    path.write_text(f"{json.dumps(line)}\n\n{json.dumps(line)}\n")
    assert read_tasks(path) == [Task("a", ("b", "c"), 1)] * 2
    for text, words in (
        ("", "has no tasks"),
        ("{", "line 1: "),
        (json.dumps(line | {"gold": 2}), "line 1: gold is 2, and there are 2 choices"),
        (json.dumps(line | {"choices": ["", "c"]}), "the query or a choice is empty"),
        (json.dumps(line | {"gold": "x"}), r"line 1: Expected `int`, got `str` - at `\$.gold`"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_tasks(path)
    with pytest.raises(UsageError, match="there is no such file"):
        read_tasks(tmp_path / "absent")
