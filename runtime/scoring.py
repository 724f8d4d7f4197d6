"""Scores, one definition for training, evaluation and benchmarks.

VQA accuracy follows the official VQA v2 script in every detail, quirks included, so that numbers compare with published
ones (rules: reference/training.md §1.13). Scores are fractions from 0 to 1.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from runtime.dataset import Row
from runtime.errors import DataError
from runtime.text import normalise_caption, normalise_question

ANNOTATORS_TO_AGREE = 3
"""An answer is fully right when this many other annotators gave it; with fewer answers we compare exactly."""

NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBER_WORDS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}

ARTICLES = frozenset({"a", "an", "the"})

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
"""Right spellings of the official table, which lists each with one apostrophe missing, whichever it is."""


def _misspelled(word: str) -> Iterable[str]:
    return (word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'")


CONTRACTIONS = {wrong: word for word in CONTRACTED.split() for wrong in _misspelled(word)} | {"somebody'd": "somebodyd"}
"""The last entry is upside down in the official table and stays so."""

_LONE_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIODS_REMOVED = int(re.UNICODE)
"""The official script passes this flag where `re.sub` takes a count, so only the first 32 periods go."""


def vqa_normalise(answer: str) -> str:
    """A predicted answer in the form the official VQA script compares."""
    return _digits_and_articles(_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Official VQA accuracy of one prediction against its reference answers (0 to 1).

    Each reference is left out in turn; the rest award min(1, matches / 3); the mean counts. References lose their
    punctuation only when they differ from each other, and never their articles, as in the official script. With one or
    two references there is no vote: the normalised prediction must equal a normalised reference. (Three that agree
    give 2/3, as the official formula has it.)

    Raises:
        DataError: `answers` is empty.
    """
    if not answers:
        raise DataError(f"expected reference answers to score {prediction!r} against, found none")
    predicted = vqa_normalise(prediction)
    if len(answers) < ANNOTATORS_TO_AGREE:
        return float(predicted in {vqa_normalise(answer) for answer in answers})
    references = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(references)) > 1:
        references = [_punctuation(reference) for reference in references]
    matches = references.count(predicted)
    left_out = (matches - (reference == predicted) for reference in references)
    return sum(min(1.0, others / ANNOTATORS_TO_AGREE) for others in left_out) / len(references)


def caption_exact(prediction: str, references: Sequence[str]) -> bool:
    """Whether a caption equals one of the references after `normalise_caption`."""
    return normalise_caption(prediction) in {normalise_caption(reference) for reference in references}


def question_prior(train_rows: Iterable[Row], test_rows: Iterable[Row]) -> float:
    """VQA accuracy on `test_rows` of the best answerer that never looks at an image.

    Answerer n reads the first n words of a question, and of those as many as training questions begin with, and gives
    the most frequent training answer after them; the last one reads whole questions. The score is that of the one
    that does best on the test rows: reading more is not always better, as a rare question has few answers to learn
    from.

    Raises:
        DataError: either side has no answered question.
    """
    votes: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in _answered(train_rows, "training"):
        words, answers = _words(row), [vqa_normalise(answer) for answer in row.answers]
        for read in range(len(words) + 1):
            votes[words[:read]].update(answers)
    said = {opening: counts.most_common(1)[0][0] for opening, counts in votes.items()}
    asked = [
        (row.answers, [words[:n] for n in range(len(words) + 1) if words[:n] in said])
        for row in _answered(test_rows, "test")
        for words in [_words(row)]
    ]
    longest = max(len(known) for _, known in asked)
    return max(
        sum(vqa_score(said[known[:read][-1]], answers) for answers, known in asked) / len(asked)
        for read in range(1, longest + 1)
    )


def _answered(rows: Iterable[Row], name: str) -> Iterator[Row]:
    found = False
    for row in rows:
        if row.question is not None and row.answers:
            found = True
            yield row
    if not found:
        raise DataError(f"expected questions with answers among the {name} rows, found none")


def _words(row: Row) -> tuple[str, ...]:
    """The question's words and an end mark, which keeps a short question apart from an opening."""
    return (*normalise_question(row.question or "").split(), "")


def _punctuation(text: str) -> str:
    has_digit_comma = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        at_word_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_word_edge or has_digit_comma else " ")
    return _LONE_PERIOD.sub("", result, count=_PERIODS_REMOVED)


def _digits_and_articles(text: str) -> str:
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
