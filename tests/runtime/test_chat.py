"""Multi-turn VQA: the prompt that is written, what is dropped, and what is paid."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qforge
from runtime.answers import Request
from runtime.bundle import Bundle, read_bundle
from runtime.decoding import Decoding
from runtime.errors import ImageError, InputError
from runtime.model import Model
from runtime.pipeline import Pipeline
from runtime.text import qformer_text
from tests.runtime.test_shared_vision import count

BLIP2 = {"caption": "a photo of", "vqa": "Question: {} Answer:"}
RED = np.full((5, 7, 3), (250, 90, 10), np.uint8)
TURNS = (("What is on the table?", "a  cup"), ("is it full", "yes!"))


@pytest.fixture
def model(tiny_bundle: Path):
    with qforge.load(tiny_bundle) as opened:
        yield opened


@pytest.fixture
def prompts(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the language model reads."""
    read: list[str] = []
    encode = model._pipeline._tokenizer.encode

    def noted(text: str, special: bool = True) -> list[int]:
        read.append(text)
        return encode(text, special)

    monkeypatch.setattr(model._pipeline._tokenizer, "encode", noted)
    return read


def test_the_history_is_written_as_lavis_does() -> None:
    """LAVIS, examples/blip2_instructed_generation.ipynb: "Question: {} Answer: {}." joined by spaces."""
    request = Request(RED, "Which colour?", turns=TURNS)
    assert request.filled_prompt(**BLIP2) == (
        "Question: what is on the table? Answer: a cup. Question: is it full Answer: yes! "
        "Question: which colour? Answer:"
    )
    own = Request(RED, "Which colour?", "Q: {} A:", turns=TURNS[:1])
    assert own.filled_prompt(**BLIP2) == "Q: what is on the table? A: a cup. Q: which colour? A:"
    braces = Request(RED, "Which colour?", turns=(("what {}?", "{} {}"),))
    assert braces.filled_prompt(**BLIP2) == "Question: what {}? Answer: {} {}. Question: which colour? Answer:"


def test_the_qformer_reads_the_last_question_alone() -> None:
    request = Request(RED, "Which colour?", turns=TURNS)
    own = request.own_prompt(**BLIP2)
    assert qformer_text("question", request.question, own) == "which colour?"
    assert qformer_text("prompt", request.question, own) == "Question: which colour? Answer:"


def test_a_conversation_pays_vision_once_and_its_history_reaches_the_prompt(
    model: Model, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, qformer = count(model._pipeline, monkeypatch)
    chat = model.chat(RED, max_new_tokens=2)
    answers = [chat.ask("colour"), chat.ask("opposite colour"), chat.ask("colour")]
    assert [answer.text for answer in answers] == ["a red", "a blue", "a red"], "the last question reaches the Q-Former"
    assert (vision.images, qformer.images) == (1, 2), "and a question that comes again costs nothing"
    assert prompts[-1] == (
        "question colour answer a red. question opposite colour answer a blue. question colour answer"
    )
    assert chat.turns == (("colour", "a red"), ("opposite colour", "a blue"), ("colour", "a red"))
    assert [answer.dropped_turns for answer in answers] == [0, 0, 0]
    asked_at_once = model.chat(RED, [*chat.turns[:2], "colour"], max_new_tokens=2)
    assert (asked_at_once.text, asked_at_once.token_ids) == (answers[2].text, answers[2].token_ids)
    assert vision.images == 1
    for last in ("colour", ("colour",), ("colour", None)):
        assert model.chat(RED, [("photo", "a photo"), last]).text == "a red"


def test_oldest_turns_go_whole_and_are_counted(model: Model, prompts: list[str]) -> None:
    """20 positions: 2 of the image, 5 new tokens less one, so 14 of the prompt; a turn of the tiny world takes 6."""
    chat = model.chat(RED)
    dropped = [chat.ask("colour").dropped_turns for _ in range(4)]
    assert dropped == [0, 0, 1, 2]
    assert prompts[-1].count("question") == 2
    assert len(chat.turns) == 4, "what was said is kept, even where prompts have no room for it"
    assert chat.ask("colour").as_json()["dropped_turns"] == 3
    short = model.chat(RED, max_new_tokens=1)
    assert [short.ask("colour").dropped_turns for _ in range(3)] == [0, 0, 0], "fewer new tokens leave more room"


def test_a_long_history_is_not_read_turn_by_turn(model: Model, prompts: list[str]) -> None:
    """What fits is found by halving: 2,000 turns cost a dozen prompts, not 2,000."""
    answer = model.chat(RED, [*(("colour", f"a {number}") for number in range(2000)), "opposite colour"])
    assert (answer.text, answer.dropped_turns) == ("a blue", 1999)
    assert prompts[-1] == "question colour answer a 1999. question opposite colour answer"
    assert len(prompts) < 20


def test_a_question_that_does_not_fit_alone_is_refused_and_changes_nothing(model: Model) -> None:
    chat = model.chat(RED)
    chat.ask("colour")
    for question in ("photo " * 14, "", " . ", "a\x00b"):
        with pytest.raises(InputError):
            chat.ask(question)
        with pytest.raises(InputError):
            chat.stream(question)
    assert chat.turns == (("colour", "a red"),)
    assert chat.ask("opposite").text == "a blue"


def test_max_new_tokens_is_told_before_turns_are_dropped(model: Model) -> None:
    with pytest.raises(InputError, match="max_new_tokens: expected 1 to 8"):
        model.chat(RED, max_new_tokens=99).ask("colour")


def test_a_streamed_answer_becomes_a_turn_at_its_end(model: Model) -> None:
    chat = model.chat(RED)
    pieces = chat.stream("colour")
    first = next(pieces)
    assert chat.turns == () and first.answer is None
    *_, last = pieces
    assert last.answer is not None and last.answer.text == "a red"
    assert chat.turns == (("colour", "a red"),)
    whole = model.chat(RED, [("colour", "a red"), "opposite"])
    *_, last = chat.stream("opposite")
    assert last.answer is not None
    assert (last.answer.text, last.answer.token_ids) == (whole.text, whole.token_ids)
    assert set(last.answer.as_json()) == set(whole.as_json()) >= {"dropped_turns"}
    with pytest.raises(InputError, match="num_beams: expected 1 in a stream"):
        model.chat(RED, decoding=Decoding(num_beams=2)).stream("colour")
    assert model.chat(RED, ["colour"], decoding=Decoding(num_beams=2)).text == "a red"


def test_the_image_is_read_once(model: Model, tmp_path: Path) -> None:
    """A file that changes in the middle does not change what is talked about."""
    Image.fromarray(RED).save(tmp_path / "photo.png")
    chat = model.chat(tmp_path / "photo.png")
    Image.new("RGB", (4, 4), (0, 200, 0)).save(tmp_path / "photo.png")
    answer = chat.ask("colour")
    assert (answer.text, answer.image) == ("a red", str(tmp_path / "photo.png"))
    with pytest.raises(ImageError):
        model.chat(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        ([], "turns: expected a list such as"),
        ("colour", "turns: expected a list such as"),
        ([("colour", "a red")], "expected a question without an answer as the last turn"),
        ([("colour", None), "colour"], r"expected \(question, answer\) as turn 1"),
        (["colour", "colour"], r"expected \(question, answer\) as turn 1"),
        ([("colour", 5), "colour"], "turns: answer: expected text, found int"),
        ([(" ", "a red"), "colour"], "question: expected words"),
    ],
)
def test_turns_that_are_none(model: Model, turns, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        model.chat(RED, turns)


def test_a_caption_has_no_history(model: Model) -> None:
    with pytest.raises(InputError, match="a caption has no history"):
        model.answer([Request(RED, turns=(("colour", "a red"),))])


def test_a_qformer_that_reads_prompts_is_given_the_last_one(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    reads_prompts = bundle.manifest.model.model_copy(update={"qformer_reads": "prompt"})
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"model": reads_prompts}))
    with Pipeline(changed, cache_bytes=0) as pipeline:
        behind, alone = Request(RED, "colour", turns=(("opposite", "a"),)), Request(RED, "colour")
        assert pipeline._question_ids(behind) == pipeline._question_ids(alone)
        assert [answer.text for answer in pipeline.answer([behind, alone])] == ["a red", "a red"]
        assert pipeline.vqa(RED, "opposite").text == "a blue"
