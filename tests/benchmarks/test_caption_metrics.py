"""pycocoevalcap's scorers are called the right way round and without Java."""

import pytest

from benchmarks.caption_metrics import corpus_scores

REFERENCES = [
    ["a small red circle left of a large blue square", "a red circle and a blue square"],
    ["two green triangles at the top of the picture"],
    ["one orange star below a purple heart"],
]


def test_perfect_captions_get_the_highest_scores() -> None:
    found = corpus_scores([references[0] for references in REFERENCES], REFERENCES)
    assert found["BLEU-4"] == pytest.approx(1.0, abs=1e-6)
    assert found["ROUGE-L"] == pytest.approx(1.0)
    assert found["CIDEr"] > 8, "10 at most, less because the second reference of the first item differs"


def test_worse_captions_score_lower_on_every_metric() -> None:
    good = corpus_scores([references[0] for references in REFERENCES], REFERENCES)
    worse = corpus_scores(["a small red circle", *(references[0] for references in REFERENCES[1:])], REFERENCES)
    wrong = corpus_scores(["nothing"] * 3, REFERENCES)
    for metric in good:
        assert good[metric] > worse[metric] > wrong[metric]


def test_case_and_punctuation_do_not_count() -> None:
    shouted = ["A small RED circle, left of a large blue square."] + [references[0] for references in REFERENCES[1:]]
    assert corpus_scores(shouted, REFERENCES) == corpus_scores([references[0] for references in REFERENCES], REFERENCES)


def test_rouge_is_not_symmetric() -> None:
    """Recall weighs more than precision (beta 1.2): a short right caption costs more than a long one gains."""
    found = corpus_scores(["a red"], [["a red circle below"]])
    precision, recall = 1.0, 0.5
    assert found["ROUGE-L"] == pytest.approx((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))


def test_one_prediction_per_item() -> None:
    with pytest.raises(ValueError, match="1 predictions for 3 items"):
        corpus_scores(["a red circle"], REFERENCES)
