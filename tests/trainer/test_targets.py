"""What is learned of a row: split range by the row's draws, soft answers, dialogues as `qforge chat` writes them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.answers import Request
from runtime.dataset import Row
from trainer.blip2 import Blip2, new_blip2
from trainer.config import ModelConfig
from trainer.draws import StepDraws
from trainer.generative import language_loss
from trainer.targets import Target, question_target, split_target, turn_target

TURNS = (("What is it?", "A Circle, red."), ("Which colour?", "it is  red"), ("And how big is it?", "Very big!"))
VOTES = ("red", "red", "red", "red", "red", "red", "blue", "blue", "blue", "green")


def row(**fields: object) -> Row:
    empty = {"image_id": "a", "captions": (), "question": None, "answers": (), "extra": {}}
    return Row(image=Path("a.png"), **(empty | fields))


@pytest.fixture(scope="module")
def model(model_config: ModelConfig) -> Blip2:
    torch.manual_seed(0)
    return new_blip2(model_config.model_copy(update={"max_new_tokens": 6}), question_conditioned=True).eval()


def test_the_split_is_drawn_evenly_for_every_place_of_a_batch(model: Blip2) -> None:
    captioned, reads = row(captions=("a small red circle above two large squares",)), Counter[int]()
    for step in range(60):
        draws = StepDraws((0, 1, step), first=0, rows=20)
        reads.update(len(split_target(model, captioned, draws.row(place)).prompt.split()) for place in range(20))
    assert set(reads) == {1, 2, 3, 4}, "eight words, midpoint 4"
    assert max(abs(count - 300) for count in reads.values()) < 5 * np.sqrt(1200 * 0.25 * 0.75)


def test_answers_are_drawn_as_often_as_annotators_gave_them(model: Blip2) -> None:
    asked, draws = row(question="What colour?", answers=VOTES), StepDraws((0, 2, 0), first=0, rows=2000)
    said = Counter(question_target(model, asked, draws.row(place)).answer for place in range(2000))
    for answer, share in {"red": 0.6, "blue": 0.3, "green": 0.1}.items():
        assert said[answer] / 2000 == pytest.approx(share, abs=0.05)


def test_a_turn_is_prompted_as_chat_prompts_it(model: Blip2) -> None:
    templates = {"caption": model.config.caption_prompt, "vqa": model.config.vqa_prompt}
    drawn = [turn_target(model, row(turns=TURNS), np.random.default_rng(seed), 200) for seed in range(40)]
    assert {target.answer for target in drawn} == {"A Circle, red.", "it is red", "Very big!"}
    for target in drawn:
        place = ["A Circle, red.", "it is red", "Very big!"].index(target.answer)
        request = Request("a.png", question=TURNS[place][0], turns=TURNS[:place])
        assert target.prompt == request.filled_prompt(**templates)
        assert target.question == ["what is it?", "which colour?", "and how big is it?"][place]


def test_the_oldest_turns_go_when_the_prompt_is_too_long(model: Blip2) -> None:
    expected = "Question: which colour? Answer: it is red. Question: and how big is it? Answer:"
    room = len(model.tokenizer(expected).input_ids)
    drawn = [turn_target(model, row(turns=TURNS), np.random.default_rng(seed), room) for seed in range(40)]
    assert {target.prompt for target in drawn if target.answer == "Very big!"} == {expected}
    alone = [turn_target(model, row(turns=TURNS), np.random.default_rng(s), 1).prompt for s in range(40)]
    assert "Question: and how big is it? Answer:" in alone, "the question itself always stays"


def test_a_dialogue_is_learned_on_its_answer_alone_and_cut_at_the_new_tokens(model: Blip2) -> None:
    """Six tokens at most with the end token, where captions have 32; what comes after is not learned."""
    features = torch.randn(1, 17, 32)
    prompt, words = "Question: what is it? Answer:", [f"red{i}" for i in range(20)]
    ids = model.tokenizer(" " + " ".join(words), add_special_tokens=False).input_ids
    kept = model.tokenizer.decode(ids[:5])
    with torch.no_grad():
        cut = language_loss(model, features, [Target(prompt, " ".join(words), "what is it?", 6)])
        same = language_loss(model, features, [Target(prompt, kept.strip(), "what is it?", 6)])
        whole = language_loss(model, features, [Target(prompt, " ".join(words), "what is it?")])
    torch.testing.assert_close(cut, same)
    assert not torch.isclose(cut, whole)
