"""Official VQA rules on cases worked out by hand, and the question-only prior."""

import pytest

from runtime.dataset import Row
from runtime.errors import DataError
from runtime.scoring import CONTRACTIONS, caption_exact, question_prior, vqa_normalise, vqa_score


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Red", "red"),
        ("  red\n car\t", "red car"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("A red car on the road", "red car on road"),
        ("isnt it", "isn't it"),
        ("wouldn'tve", "wouldn't've"),
        ("'ow'sat", "'ow's'at"),
        ("let's", "let's"),
        ("somebody'd", "somebodyd"),  # upside down in the official table
        ("Im", "im"),  # the table's capital letters never meet lower-case words
        ("red/blue", "red blue"),  # between letters a mark becomes a space
        ("red / blue", "red blue"),  # at a word's edge it goes
        ("well-known", "well known"),
        ("wow!", "wow"),
        ("left- right-hand", "left righthand"),  # one hyphen at an edge removes every hyphen
        ("1,000", "1000"),  # a comma between digits goes …
        ("1,000 red/blue", "1000 redblue"),  # … and takes every mark with it
        ("3.5", "3.5"),
        ("no. 5", "no 5"),
        ("5.", "5"),
        ("U.S.A.", "usa"),
        ("a", ""),
        ("", ""),
        ("what?no", "what no"),
        ("it's", "it's"),
        ("$5", "$5"),
    ],
)
def test_normalisation(answer, expected):
    assert vqa_normalise(answer) == expected


def test_only_the_first_32_periods_go():
    assert vqa_normalise("." * 40) == "." * 8


def test_contraction_table_has_the_official_size():
    assert len(CONTRACTIONS) == 114  # 120 entries less four in capitals and two that map to themselves


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        # Ten annotators, m matches: (m * min(1, (m-1)/3) + (10-m) * min(1, m/3)) / 10
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        ("red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("red", ["red"] + ["blue"] * 9, (0 + 9 * 1 / 3) / 10),
        ("green", ["red"] * 5 + ["blue"] * 5, 0.0),
        ("red", ["red"] * 3, 2 / 3),
        # References lose punctuation only when they differ, and never articles or capitals
        ("red-ish", ["red-ish"] * 10, 0.0),
        ("red-ish", ["red-ish"] * 9 + ["blue"], 1.0),
        ("the car", ["the car"] * 9 + ["bus"], 0.0),
        ("the car", ["car"] * 10, 1.0),
        ("two", ["2"] * 10, 1.0),
        ("red", ["red\n"] * 10, 1.0),
        # One or two references: equal after full normalisation of both sides
        ("The Red Car.", ["red car"], 1.0),
        ("red", ["Red!"], 1.0),
        ("2", ["blue", "two"], 1.0),
        ("red", ["blue"], 0.0),
    ],
)
def test_score(prediction, answers, score):
    assert vqa_score(prediction, answers) == pytest.approx(score)


def test_no_reference_is_an_error():
    with pytest.raises(DataError, match="found none"):
        vqa_score("red", [])


def test_caption_exact():
    assert caption_exact("A red circle.", ["a blue circle", "a  red circle"])
    assert not caption_exact("a red circle", ["a red circle and more"])
    assert not caption_exact("a red circle", [])


def ask(question, *answers):
    return Row(image=None, image_id="1", captions=(), question=question, answers=answers, extra={})


def test_question_prior_falls_back_step_by_step():
    train = [
        ask("What colour is it?", "red"),
        ask("what colour is it?", "red"),
        ask("what colour is it?", "blue"),
        ask("what colour now?", "blue"),
        ask("what colour then?", "blue"),
        ask("is it?", "yes"),
        ask("how many?", "yes"),
        ask("why?", "yes"),
        ask("who?", "yes"),
    ]
    same = ask("what colour is it?", "red")  # red 2, blue 1
    opening = ask("what colour was that?", "blue")  # red 2, blue 3 after "what colour"
    anything = ask("where?", "yes")  # yes 4, blue 3, red 2
    assert question_prior(train, [same, opening, anything]) == 1.0
    assert question_prior(train, [same, ask("what colour is it?", "blue")]) == 0.5


def test_a_short_question_is_not_mistaken_for_an_opening():
    train = [ask("what colour", "red"), ask("what colour is it", "blue"), ask("what colour was it", "blue")]
    assert question_prior(train, [ask("what colour", "red")]) == 1.0


def test_the_best_question_only_answerer_is_the_one_that_reads_just_enough():
    train = [ask("is the red one left?", "no"), *[ask(f"is the {c} one right?", "yes") for c in ("blue", "green")]]
    test = [ask("is the red one left?", "yes"), ask("is the pink one left?", "yes")]
    assert question_prior(train, test) == 1.0  # "is the" → yes; whole questions would give 0.5


def test_question_prior_needs_answers():
    captions_only = Row(image=None, image_id="1", captions=("x",), question=None, answers=(), extra={})
    with pytest.raises(DataError, match="training rows"):
        question_prior([captions_only], [ask("q", "a")])
    with pytest.raises(DataError, match="test rows"):
        question_prior([ask("q", "a")], [ask("q")])
