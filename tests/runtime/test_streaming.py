"""Streamed text: pieces never change, and never show half a character, whatever the tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import runtime
from runtime.answers import Request
from runtime.decoding import Decoding
from runtime.errors import ImageError, InputError
from runtime.streaming import SteadyText
from runtime.tokenizer import BYTES, TextTokenizer

TEXTS = [
    "a red circle left of a blue square",
    "naïve café, 日本語 ok 😀😀 end",
    "don't stop . now , please !",
    "one\nline é\nand another  with   spaces ",
    "猫在桌子上。一只 red 猫、and a 犬",
    "ねこが机の上に、カップがある",
    "😀",
    "",
]


def byte_level() -> Tokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama's way: marked spaces, and bytes for what is not in the vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz.,!'猫在桌子上。"
    vocabulary = {token: number for number, token in enumerate([*BYTES, "▁", *letters, "<unk>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def word_piece() -> Tokenizer:
    """Its decoder takes spaces back before punctuation."""
    words = "[UNK] a red circle left of blue square don ' t stop . now , please ! one line and another with ##s ##top"
    words += " 猫 在 桌 子 上 。 ##猫"
    vocabulary = {word: number for number, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # puts Chinese characters apart
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return tokenizer


@pytest.fixture(params=[byte_level, byte_fallback, word_piece], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    request.param().save(str(tmp_path / "tokenizer.json"))
    return TextTokenizer(tmp_path / "tokenizer.json")


def check(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    """The pieces, each a certain part of the whole text."""
    whole, steady, shown = tokenizer.decode(ids), SteadyText(tokenizer), ""
    pieces = [steady.put(token) for token in ids]
    for piece in pieces:
        shown += piece
        assert whole.startswith(shown)
    rest, text = steady.end()
    assert (shown + rest, text) == (whole, whole)
    return [piece for piece in pieces if piece]


@pytest.mark.parametrize("text", TEXTS)
def test_real_text(tokenizer: TextTokenizer, text: str) -> None:
    pieces = check(tokenizer, tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces), "half a character"


def test_any_tokens_whatever(tokenizer: TextTokenizer) -> None:
    """Also broken UTF-8, as a model with random weights says it."""
    rng = np.random.default_rng(0)
    size = len(tokenizer._tokenizer.get_vocab())
    for _ in range(300):
        ids = rng.integers(0, size, rng.integers(0, 25)).tolist()
        for release in ("a .", "猫"):  # often enough to release what is held back
            more = tokenizer.encode(release)
            check(tokenizer, [token for one in ids for token in (one, *(more if rng.random() < 0.3 else []))])


def test_words_come_as_they_are_said(tokenizer: TextTokenizer) -> None:
    pieces = check(tokenizer, tokenizer.encode(TEXTS[0]))
    assert [piece.strip() for piece in pieces] == TEXTS[0].split()[:-1], "all but the last, which may go on"


def test_words_without_spaces_come_as_transformers_streams_them(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """`TextStreamer` shows Chinese as it comes, and so do we; kana and punctuation too, which it waits with."""
    from transformers import PreTrainedTokenizerFast, TextStreamer

    class Streamer(TextStreamer):
        shown = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.shown += text

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    for text in ("猫在桌子上。", "猫在桌子上 now 猫", "桌子 and 猫在上。"):
        streamer, steady, shown = Streamer(theirs, skip_special_tokens=True), SteadyText(tokenizer), ""
        compared = 0
        for token in tokenizer.encode(text):
            streamer.put(torch.tensor([token]))
            shown += steady.put(token)
            if streamer.shown and streamer.shown[-1] in "猫在桌子上":
                assert shown.strip("。") == streamer.shown.strip()
                compared += 1
        assert compared >= 4
    pieces = check(tokenizer, tokenizer.encode("猫在桌子上。"))
    assert [piece.strip() for piece in pieces] == [*"猫在桌子上。"], "one by one"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), (250, 90, 10)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_a_streamed_answer_is_the_answer(tiny_bundle: Path, picture: Path) -> None:
    with runtime.load(tiny_bundle) as pipeline:
        for request in (Request(picture), Request(picture, "opposite colour"), Request(picture, prompt="a photo of")):
            for decoding in (Decoding(), Decoding(do_sample=True, seed=4), Decoding(stop_strings=("a",))):
                (whole,) = pipeline.answer([request], decoding=decoding)
                *pieces, last = pipeline.stream(request, decoding=decoding)
                assert last.answer is not None
                assert all(piece.answer is None and len(piece.token_ids) == 1 for piece in pieces)
                assert "".join(piece.text for piece in [*pieces, last]) == whole.text == last.answer.text
                assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
                assert last.answer.token_ids == whole.token_ids
                assert (last.answer.image, last.answer.question) == (whole.image, whole.question)
                assert set(last.answer.timings_ms) == set(whole.timings_ms)


def test_what_is_wrong_is_said_before_the_first_piece(tiny_bundle: Path, picture: Path) -> None:
    with runtime.load(tiny_bundle) as pipeline:
        with pytest.raises(InputError, match="num_beams: expected 1 in a stream"):
            pipeline.stream(Request(picture), decoding=Decoding(num_beams=2))
        with pytest.raises(InputError, match="max_new_tokens: expected 1 to 8"):
            pipeline.stream(Request(picture), max_new_tokens=9)
        with pytest.raises(ImageError):
            pipeline.stream(Request(b"not an image"))


def test_several_texts_for_one_image(tiny_bundle: Path, picture: Path) -> None:
    """Of beams and of draws, in batches, each image's own; the JSON is as before where there is one text."""
    with runtime.load(tiny_bundle) as pipeline:
        (alone,) = pipeline.caption(picture)
        assert "alternatives" not in alone.as_json()
        beams = Decoding(num_beams=3, num_return_sequences=2)
        blue = np.full((4, 4, 3), (40, 10, 220), np.uint8)
        red, also_blue = pipeline.caption([picture, blue], decoding=beams)
        assert (red.text, also_blue.text) == ("a red", "a blue")
        assert red.texts[0] == red.text and len(set(red.texts)) == 2
        (other,) = red.as_json()["alternatives"]
        assert other == {"text": red.texts[1], "token_ids": list(red.alternatives[0].token_ids)}
        drawn = Decoding(do_sample=True, temperature=40.0, top_k=0, seed=3, num_return_sequences=3)
        many = pipeline.answer([Request(picture), Request(blue), Request(picture, "colour")], decoding=drawn)
        assert all(len(answer.texts) == 3 for answer in many)
        assert pipeline.vqa(picture, "colour", decoding=drawn).texts == many[2].texts
        with pytest.raises(InputError, match="num_beams: expected at most 3"):
            pipeline.caption(picture, decoding=Decoding(num_beams=4))
