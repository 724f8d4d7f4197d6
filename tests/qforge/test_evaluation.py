"""A bundle and a checkpoint are told apart by what lies in the folder, and progress adds up."""

from pathlib import Path

import pytest

from qforge.evaluation import evaluate_rows, kind_of, open_answerer, reporting
from runtime.answers import Answer, Request
from runtime.backends import CPU
from runtime.dataset import Row
from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError, MissingFile


@pytest.mark.parametrize(("file", "kind"), [("manifest.json", "bundle"), ("model.safetensors", "checkpoint")])
def test_kind_is_read_off_the_folder(file: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    assert kind_of(tmp_path) == kind


def test_neither_bundle_nor_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found neither"), open_answerer(tmp_path, CPU):
        pass
    with pytest.raises(MissingFile, match="found nothing there"), open_answerer(tmp_path / "no", CPU):
        pass


class Parrot:
    """Answers every question with its own last word, every picture with one caption."""

    def answer(
        self, requests: list[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        texts = [(request.question or "red circle").split()[-1] for request in requests]
        return [Answer("x.png", request.question, text, (), {}) for request, text in zip(requests, texts, strict=True)]


def rows(count: int) -> list[Row]:
    return [Row(Path("x.png"), str(i), (), f"is it {i % 2}", ("1",), {}) for i in range(count)]


def test_scores_come_from_the_shared_scorer(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = evaluate_rows(Parrot(), rows(5), "vqa", 2, "questions")
    assert evaluation.metrics == {"accuracy": 0.4}
    assert "questions: 5/5" in capsys.readouterr().err


def test_progress_counts_every_item_once(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting("work") as progress:
        for done in (3, 3, 7):
            progress(done, 7)
    assert "work: 7/7" in capsys.readouterr().err
