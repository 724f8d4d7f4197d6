"""The demo's language halves: told the same documents, each in its own way, and able to read answers off them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.files import sha256_of
from runtime.progress import Progress
from trainer.config import DEMO, DEMO_FOLDERS, DEMO_T5, DemoHalvesConfig, ModelConfig
from trainer.demo_world.documents import (
    CAPTION,
    DOCUMENT_TOKENS,
    QUESTION,
    SAID_TOKENS,
    Document,
    documents,
    lesson_decoder_only,
    lesson_encoder_decoder,
)
from trainer.demo_world.halves import build_halves
from trainer.demo_world.language import QuestionWriter
from trainer.demo_world.reader import answers_read_off
from trainer.demo_world.scene import WIDE, random_scenes
from trainer.demo_world.vocabulary import train_language_tokenizer
from trainer.language import load_language, style_of
from trainer.losses import IGNORED
from trainer.new_halves import new_encoder_decoder
from trainer.towers import DEMO_HALVES, load_tokenizer, source_folder

PROMPT = ModelConfig().vqa_prompt
SMALL = DemoHalvesConfig(
    told_scenes=12,
    language_steps=3,
    note_steps=2,
    language_batch_size=4,
    t5_steps=9,
    t5_page_steps=1,
    t5_note_steps=1,
    t5_batch_size=4,
)


def told(scenes: int, seed: int = 0) -> list[Document]:
    rng, writer = np.random.default_rng(seed), QuestionWriter(seed, WIDE)
    return [d for s in random_scenes(scenes, "val", seed, WIDE) for d in documents(s, writer, rng, PROMPT)]


@pytest.fixture(scope="module")
def docs() -> list[Document]:
    return told(60)


def words(text: str) -> str:
    return " ".join(text.split())


def letters(text: str) -> str:
    """Texts begin without a space, so where they meet none is left."""
    return "".join(text.split())


def test_a_decoder_only_model_reads_a_document_from_beginning_to_end(docs: list[Document]) -> None:
    tokenizer = train_language_tokenizer([text for doc in docs for text in doc.texts()], "decoder-only")
    lesson = lesson_decoder_only(docs, tokenizer)
    assert lesson.read_NS is None
    for doc, ids, weights in zip(docs, lesson.said_NT, lesson.weights_NT, strict=True):
        text = letters(tokenizer.decode(ids[weights > 0], skip_special_tokens=True))
        whole = letters(doc.facts + "".join(f" {given}{said}" for given, said in doc.told))
        assert whole.startswith(text)  # long notes are cut
        counted = tokenizer.decode(ids[weights == doc.weight], skip_special_tokens=True)
        assert letters(" ".join(said for _, said in doc.told)).startswith(letters(counted))


def test_an_encoder_decoder_reads_what_is_given_and_says_what_follows(docs: list[Document]) -> None:
    tokenizer = train_language_tokenizer([text for doc in docs for text in doc.texts()], "encoder-decoder")
    lesson = lesson_encoder_decoder(docs, tokenizer, np.random.default_rng(0))
    assert lesson.read_NS is not None
    assert lesson.asked_NS is not None
    kinds = Counter[str]()
    parts = zip(docs, lesson.read_NS, lesson.asked_NS, lesson.said_NT, lesson.weights_NT, strict=True)
    for doc, read, asked, said, weights in parts:
        heard = words(tokenizer.decode(read, skip_special_tokens=True))
        spoken = words(tokenizer.decode(said[weights > 0], skip_special_tokens=True))
        places = (asked != IGNORED).nonzero()[:, 0].tolist()
        assert heard.startswith(doc.facts)
        if doc.kind == CAPTION:  # whole, or from a word before its midpoint on
            beginning, caption = words(heard.removeprefix(doc.facts)), doc.told[0][1]
            assert words(f"{beginning} {spoken}") == caption
            assert len(beginning.split()) <= len(caption.split()) / 2
            assert not places
            kinds["split" if beginning else "whole"] += 1
            continue
        whole = words(" ".join([doc.facts, *(given for given, _ in doc.told)]))
        assert whole.startswith(heard)  # long notes are cut
        for place, (given, follows) in zip(places, doc.told, strict=False):
            before = tokenizer.decode(read[: place + 1], skip_special_tokens=True)
            assert before.endswith(given.strip())
            assert follows.split()[0].startswith(tokenizer.decode(asked[place]).strip())
        if doc.kind == QUESTION:
            assert len(places) == 1
            assert spoken == doc.told[0][1].strip()
            assert (weights == doc.weight).sum() == len(tokenizer(spoken, add_special_tokens=False).input_ids)
        else:
            assert not weights.any()
            kinds["notes"] += len(places)
    assert min(kinds["split"], kinds["whole"]) > 10
    assert kinds["notes"] > 500
    assert lesson.read_NS.shape[1] == DOCUMENT_TOKENS
    assert lesson.said_NT.shape[1] == SAID_TOKENS


def test_a_new_encoder_decoder_looks_at_neighbours() -> None:
    model = new_encoder_decoder(vocabulary=40, width=32, layers=1, decoder_layers=1, heads=4, end=2, pad=1)
    for stack, looks in ((model.encoder, ("before", -1, 1, None)), (model.decoder, (None, -1, None, None))):
        attention = stack.block[0].layer[0].SelfAttention
        bias_HST = attention.compute_bias(9, 9)[0]
        for bias_ST, neighbour in zip(bias_HST, looks, strict=True):
            if neighbour == "before":
                assert bias_ST[4, :3].tolist() == [0, 0, 0]
                assert bias_ST[4, 3:].max() < -1
            elif neighbour is None:
                assert bias_ST.abs().max() == 0
            else:
                assert int(bias_ST[4].argmax()) == 4 + neighbour


@pytest.mark.parametrize("source", [DEMO, DEMO_T5])
def test_a_half_can_be_made_again(source: str, tmp_path: Path) -> None:
    """Same seed, same bytes; what comes out is a language model of the style that the source names."""
    folder = DEMO_FOLDERS["language", source]
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        build_halves(SMALL, PROMPT, [folder, "text"], tmp_path / name, Progress(quiet=True))
    one, other = (tmp_path / name / folder for name in ("one", "other"))
    for file in sorted(one.iterdir()):
        assert sha256_of(file) == sha256_of(other / file.name), file.name
    record = json.loads((tmp_path / "one" / "record.json").read_text())
    assert record[folder]["settings"] == SMALL.model_dump(exclude={"rebuild"})
    assert record[folder]["threads"] == torch.get_num_threads()
    assert set(record[folder]["held_out"]) == {"weighted_loss_nats", "answers_read_off_context"}
    assert style_of(load_language(str(one))) == style_of(load_language(source))
    shipped = sorted(file.name for file in Path(source_folder(source, "language")).iterdir())
    assert sorted(file.name for file in one.iterdir()) == shipped


RECORDED = {DEMO: 0.95, DEMO_T5: 0.94}
HERE = {DEMO: 0.93, DEMO_T5: 0.92}
"""Share of held-out answers that a shipped half reads off its facts, as recorded and on the 240 questions here."""


@pytest.mark.parametrize("source", RECORDED)
def test_a_shipped_half_reads_answers_off_facts_it_was_never_told(source: str) -> None:
    model, tokenizer = load_language(source), load_tokenizer(source, "language")
    assert answers_read_off(model, tokenizer, told(60, seed=77)) >= HERE[source]


def test_every_shipped_half_has_a_record() -> None:
    record = json.loads((DEMO_HALVES / "record.json").read_text())
    assert set(record) == set(DEMO_FOLDERS.values())
    for source, share in RECORDED.items():
        assert record[DEMO_FOLDERS["language", source]]["held_out"]["answers_read_off_context"] >= share
    assert (Path(source_folder(DEMO_T5, "language")) / "model.safetensors").stat().st_size < 3e6


def test_a_recipe_names_the_halves_it_takes() -> None:
    assert ModelConfig().shipped_halves()["language"] == "language"
    assert ModelConfig(language=DEMO_T5).shipped_halves()["language"] == "language_t5"
    assert ModelConfig(language="./mine", text_tokenizer=None).shipped_halves() == {"vision": "vision"}
