"""Batching, averaging and the choice of rows, with an answerer that reads the answer off the file name."""

import pytest

from runtime.answers import Answer
from runtime.dataset import Row
from runtime.decoding import GREEDY
from runtime.errors import DataError, InputError
from runtime.evaluate import evaluate


class NameReader:
    """Answers with the image's stem."""

    def __init__(self):
        self.batches = []

    def answer(self, requests, *, max_new_tokens=None, decoding=GREEDY):
        self.batches.append([(request.image.stem, request.question) for request in requests])
        return [Answer(str(r.image), r.question, r.image.stem, (1,), {"total": 1.0}) for r in requests]


def row(tmp_path, name, captions=(), question=None, answers=()):
    return Row(tmp_path / f"{name}.png", name, captions, question, answers, {})


@pytest.fixture
def rows(tmp_path):
    return [
        row(tmp_path, "red", question="q1", answers=("red",)),
        row(tmp_path, "cat", captions=("a dog", "Cat")),
        row(tmp_path, "blue", question="q2", answers=("red",)),
        row(tmp_path, "dog", captions=("a dog",), question="q3", answers=("dog",)),
        row(tmp_path, "nobody", question="unanswered"),
        row(tmp_path, "two", question="q4", answers=("2",) * 10),
    ]


def test_vqa(rows):
    answerer, told = NameReader(), []
    result = evaluate(answerer, rows, task="vqa", batch_size=3, progress=lambda *numbers: told.append(numbers))
    assert answerer.batches == [[("red", "q1"), ("blue", "q2"), ("dog", "q3")], [("two", "q4")]]
    assert told == [(3, 4), (4, 4)]
    assert result.as_json() == {"metrics": {"accuracy": 0.75}, "n": 4, "settings": {"task": "vqa", "batch_size": 3}}
    assert [answer.text for answer in result.answers] == ["red", "blue", "dog", "two"]


def test_captions_with_a_scorer(rows):
    answerer = NameReader()
    scorers = {"letters": lambda text, row: len(text) / 10 + len(row.captions)}
    result = evaluate(answerer, rows, task="caption", batch_size=8, scorers=scorers)
    assert answerer.batches == [[("cat", None), ("dog", None)]]
    assert result.metrics == {"exact_match": 0.5, "letters": pytest.approx(1.8)}


def test_refusals(rows):
    with pytest.raises(DataError, match="expected rows with captions, found none among 1"):
        evaluate(NameReader(), rows[:1], task="caption", batch_size=1)
    with pytest.raises(DataError, match="expected rows with questions and answers"):
        evaluate(NameReader(), [], task="vqa", batch_size=1)
    with pytest.raises(InputError, match="at least 1, found 0"):
        evaluate(NameReader(), rows, task="vqa", batch_size=0)
