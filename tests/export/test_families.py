"""Language models of six shapes, exported: the bundle answers as transformers' own `generate`, token for token.

Every model has the same vision tower and bridge weights as the tiny model of conftest.py, so those two graphs are
copied from its bundle; the export judges them again like all others.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.calibration import question_ids
from runtime.answers import Request
from runtime.backends import Device
from runtime.decoding import Decoding
from runtime.errors import InputError
from runtime.pipeline import Pipeline
from runtime.preprocess import preprocess_batch
from runtime.replay import replay
from runtime.stopwatch import Stopwatch
from tests.export.family_exports import ENCODER_DECODERS, READS_PROMPTS, answered, parity
from tests.families import FAMILIES, SPARE_ROWS
from trainer.blip2 import Blip2
from trainer.generate import EagerPipeline


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bundle_answers_token_for_token(name: str, family, asked: list[Request]) -> None:
    made = family(name)
    expected = [answer.token_ids for answer in EagerPipeline(made.model).answer(asked)]
    together = answered(made.bundle, asked)
    assert together == expected
    lengths = {len(ids) for ids in expected}
    assert max(lengths) == made.model.config.max_new_tokens, "some answers run to the limit"
    assert min(lengths) < made.model.config.max_new_tokens, "some answers end by an end token"
    assert len(set(expected)) >= 12, "a model that always says the same would prove nothing"
    assert max(len(set(ids)) for ids in expected) >= 4, "not one token repeated"


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_of_the_bundle_are_those_of_transformers(name: str, family, asked: list[Request]) -> None:
    """The cache that ONNX Runtime gave is gathered; the settings are in tests/runtime/decoding."""
    made, some = family(name), asked[:24]
    decoding = Decoding(num_beams=3, early_stopping=True, length_penalty=0.5, no_repeat_ngram_size=2)
    expected = [answer.token_ids for answer in EagerPipeline(made.model).answer(some, decoding=decoding)]
    with Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as opened:
        answers = opened.answer(some, decoding=decoding)
    assert [answer.token_ids for answer in answers] == expected != answered(made.bundle, some)


@pytest.mark.parametrize("name", FAMILIES)
def test_single_requests_equal_the_batch(name: str, family, asked: list[Request]) -> None:
    made, some = family(name), asked[:8]
    assert len({len(prompt_ids(made.model, request)) for request in some}) >= 3, "prompts of unequal length"
    together = answered(made.bundle, some)
    assert together == [answered(made.bundle, [request])[0] for request in some]
    eager = EagerPipeline(made.model)
    assert together == [eager.answer([request])[0].token_ids for request in some]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_every_step_equal_one_uncached_pass(name: str, family, asked: list[Request]) -> None:
    """Teacher forcing by transformers' forward, against what the bundle's graphs gave step by step."""
    made, request = family(name), asked[1]
    model, seen = made.model, []
    with Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as opened:
        speaker = opened._decoder._decoder if name in ENCODER_DECODERS else opened._decoder._language
        run = speaker.run

        def noted(feeds, into):
            outputs = run(feeds, into)
            seen.append(outputs["logits"][0])
            return outputs

        speaker.run = noted
        (answer,) = opened.answer([request])
    logits = whole_pass(model, request, list(answer.token_ids))[: len(seen)]
    assert len(seen) >= 2
    np.testing.assert_allclose(np.stack(seen), logits, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_have_said_more_and_less_share_a_batch(name: str, family) -> None:
    """The exported graph hides the pads between them: scores are those of each alone."""
    made, rng = family(name), np.random.default_rng(0)
    manifest = made.bundle.manifest.model
    prefix_BQD = rng.normal(size=(2, manifest.queries, manifest.language_width)).astype(np.float32)
    prompts = [made.model.tokenizer(text).input_ids for text in ("what is left", "a")]
    with Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as opened:
        decoder = opened._decoder

        def started(row: int):
            return decoder.start(prefix_BQD[row : row + 1], prompts[row : row + 1], 8)[1]

        alone, together = [started(0), started(1)], [started(0), started(1)]
        for steps in (alone[0], together[0]):
            for token in (5, 6, 7):
                steps.step(np.array([token]))
        assert together[0].can_join(together[1])
        together[0].join(together[1])
        for ids in ((8, 5), (9, 6)):
            expected_BV = np.concatenate(
                [steps.step(np.array([token])) for steps, token in zip(alone, ids, strict=True)]
            )
            np.testing.assert_allclose(together[0].step(np.array(ids)), expected_BV, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ENCODER_DECODERS])
def test_what_was_read_before_is_not_read_again(name: str, family, images: list[Path], monkeypatch) -> None:
    """Turns about one image, most beginning with one before: the graph begins behind what it knows."""
    made, fed = family(name), list[int]()
    turns = ["what is left", "what is left of it? one two", "what is left of it? one two three", "how many?"]
    prompts = [made.model.tokenizer(turn).input_ids for turn in (*turns, turns[1])]
    pixels_BCHW = preprocess_batch(images[:2], made.model.preprocess)
    with (
        Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as forgets,
        Pipeline(made.bundle, device=Device(threads=1), cache_bytes=1 << 24) as remembers,
    ):
        prefix_BQD = forgets._encoder.encode(pixels_BCHW, [None, None], Stopwatch())
        engine = remembers._decoder._language
        run = engine.run
        monkeypatch.setattr(
            engine, "run", lambda feeds, into: fed.append(feeds["inputs_embeds"].shape[1]) or run(feeds, into)
        )
        for row in range(2):
            for prompt in prompts:
                asked = (prefix_BQD[row : row + 1], [prompt], 8, Stopwatch())
                assert remembers._decoder.generate(*asked) == forgets._decoder.generate(*asked)
        counted = remembers.statistics()["prompts"]
    assert counted["hits"] == 2 * (len(prompts) - 1), "all but the first about each image"
    first = [positions for positions in fed if positions > 1]
    assert len(first) == 2 * (len(prompts) - 1), "a prefill of one position looks like a step"
    assert sum(first) < 2 * sum(4 + len(prompt) for prompt in prompts) / 2


@torch.no_grad()
def whole_pass(model: Blip2, request: Request, said: list[int]) -> np.ndarray:
    """Logits [T, V] that predict what was said, and what would have come next."""
    pixels_BCHW = torch.from_numpy(preprocess_batch([request.image], model.preprocess))
    condition = torch.tensor([question_ids(model, request)])
    prefix_BQD = model.query_prefix(model.encode_image(pixels_BCHW), condition, torch.ones_like(condition))
    embed, prompt = model.language_model.get_input_embeddings(), prompt_ids(model, request)
    if model.style == "encoder-decoder":
        given = torch.cat([prefix_BQD, embed(torch.tensor([prompt]))], dim=1)
        ids = torch.tensor([[model.start_token_id, *said]])
        return model.language_model(inputs_embeds=given, decoder_input_ids=ids).logits[0].numpy()
    given = torch.cat([prefix_BQD, embed(torch.tensor([[*prompt, *said]]))], dim=1)
    return model.language_model(inputs_embeds=given).logits[0, -1 - len(said) :].numpy()


def prompt_ids(model: Blip2, request: Request) -> list[int]:
    text = request.filled_prompt(caption=model.config.caption_prompt, vqa=model.config.vqa_prompt)
    return model.tokenizer(text).input_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_bundle_states(name: str, family) -> None:
    made = family(name)
    manifest, own = made.bundle.manifest, made.model
    cases = {(entry["graph"], entry["case"]) for entry in parity(made.bundle)}
    if name in ENCODER_DECODERS:
        assert manifest.model.style == "encoder-decoder"
        assert list(manifest.graphs) == ["vision", "qformer", "embed", "encoder", "decoder"]
        assert {("encoder", "run"), ("decoder", "prefill"), ("decoder", "step")} < cases
        assert (manifest.limits.max_positions, manifest.limits.max_new_tokens) == (512, 512)
        assert manifest.generation.start_token_id == 1
    else:
        assert manifest.model.style == "decoder-only"
        assert list(manifest.graphs) == ["vision", "qformer", "embed", "language"]
        assert {("language", "prefill"), ("language", "step")} < cases
        assert (manifest.limits.max_positions, manifest.limits.max_new_tokens) == (96, 92)
        assert manifest.generation.start_token_id is None
    assert manifest.model.qformer_reads == own.config.qformer_reads
    assert manifest.generation.eos_token_ids == own.end_token_ids == own.config.end_token_ids
    assert manifest.generation.pad_token_id == (2 if own.tokenizer.pad_token_id is None else 1)
    speaker = manifest.graphs["decoder" if name in ENCODER_DECODERS else "language"]
    assert speaker.outputs["logits"].shape == ("batch", len(own.tokenizer) + SPARE_ROWS)
    assert max(entry["max_error"] for entry in parity(made.bundle)) < 2e-5
    assert all(check.ok for check in replay(made.bundle))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_encoder_graph_holds_no_more_than_it_needs(name: str, family) -> None:
    """Of the decoder only what makes cross-attention keys and values; no embedding table in either."""
    made = family(name)
    model = made.model.language_model
    bytes_of = {graph: entry.bytes for graph, entry in made.bundle.manifest.graphs.items()}
    table = model.shared.weight.nbytes
    cross = sum(p.nbytes for n, p in model.decoder.named_parameters() if "EncDecAttention.k" in n or "Attention.v" in n)
    encoder = sum(p.nbytes for p in model.encoder.parameters()) - table
    assert bytes_of["encoder"] < encoder + cross + 40_000
    decoder = sum(p.nbytes for p in model.decoder.parameters())
    assert bytes_of["decoder"] < decoder + 60_000, "the head is there, the table is not"


@pytest.mark.parametrize("name", READS_PROMPTS)
def test_the_prompt_reaches_the_qformer(name: str, family, images: list[Path]) -> None:
    """Captions too are conditioned: another caption prompt is another prefix; the cache tells them apart."""
    bundle = family(name).bundle
    with Pipeline(bundle, device=Device(threads=1), cache_bytes=1 << 20) as opened:
        read = [opened._question_ids(Request(images[0], prompt=prompt)) for prompt in (None, "a picture of", "Two")]
        assert read[0] == read[1] != read[2]
        question = Request(images[0], "What colour?")
        assert opened._question_ids(question) == opened._qformer_tokenizer.encode("Question: what colour? Answer:")
        for prompt in (None, "a picture of", "Two"):
            opened.caption(images[0], prompt=prompt)
        assert opened.cache.hits == 1 + 1, "the same prompt again, and the features of the image for the other"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_an_empty_prompt(name: str, family, images: list[Path]) -> None:
    """Without a begin token the prefix alone is read; beside longer prompts it is one more unequal row."""
    made = family(name)
    requests = [Request(images[0], prompt=""), Request(images[1]), Request(images[2], prompt="")]
    eager = EagerPipeline(made.model)
    expected = [answer.token_ids for answer in eager.answer(requests)]
    assert answered(made.bundle, requests) == expected
    only_empty = [request for request in requests if request.prompt == ""]
    assert answered(made.bundle, only_empty) == [expected[0], expected[2]]
    assert [answer.token_ids for answer in eager.answer(only_empty)] == [expected[0], expected[2]]


def test_limits_of_an_encoder_decoder(family, images: list[Path]) -> None:
    made = family("t5")
    with Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as opened:
        with pytest.raises(InputError, match=r"image and prompt take \d{4,} positions, this bundle has 512"):
            opened.caption(images[0], prompt="red " * 2000)
        with pytest.raises(InputError, match="max_new_tokens: expected 1 to 512"):
            opened.answer([Request(images[0])], max_new_tokens=513)
        prefix = np.zeros((1, 4, 32), np.float32)
        endless = opened._decoder.generate(prefix, [[]], 30, Stopwatch())
        assert len(endless) == 1
