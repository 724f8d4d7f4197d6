"""The whole chain on real onnxruntime; the tiny bundle's answers are told by hand (conftest.py)."""

import threading

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.answers import Request
from runtime.backends import Device
from runtime.bundle import read_bundle
from runtime.errors import ImageError, InputError
from runtime.pipeline import Pipeline

RED, GREEN, BLUE = 4, 5, 6
A = 3
PHASES = {"preprocess", "vision", "qformer", "prefill", "decode", "total"}


def plain(red, green, blue):
    return np.full((5, 7, 3), (red, green, blue), np.uint8)


REDDISH, GREENISH, BLUISH = plain(250, 90, 10), plain(20, 200, 90), plain(40, 10, 220)


@pytest.fixture
def pipeline(tiny_bundle):
    with runtime.load(tiny_bundle) as opened:
        yield opened


def count_runs(engine, monkeypatch):
    """Batch sizes the engine was run with, as they come."""
    sizes, run = [], engine.run

    def counted(feeds, into=None):
        sizes.append(len(next(iter(feeds.values()))))
        return run(feeds, into)

    monkeypatch.setattr(engine, "run", counted)
    return sizes


def test_caption_names_the_strongest_colour(pipeline):
    answers = pipeline.caption([REDDISH, GREENISH, BLUISH])
    assert [answer.text for answer in answers] == ["a red", "a green", "a blue"]
    assert [answer.token_ids for answer in answers] == [(A, RED), (A, GREEN), (A, BLUE)]


def test_one_image_gives_a_list_of_one(pipeline, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(BLUISH).save(path)
    (answer,) = pipeline.caption(path)
    assert (answer.image, answer.question, answer.text) == (str(path), None, "a blue")


def test_the_question_reaches_the_qformer(pipeline):
    assert pipeline.vqa(REDDISH, "colour").text == "a red"
    assert pipeline.vqa(REDDISH, "Opposite colour?").text == "a blue"


def test_a_bundle_whose_qformer_reads_no_question(make_tiny_bundle, tmp_path):
    with runtime.load(make_tiny_bundle(tmp_path / "plain", question_conditioned=False)) as pipeline:
        assert pipeline.vqa(REDDISH, "opposite").text == "a red"
        assert pipeline.cache.misses == 1
        pipeline.vqa(REDDISH, "colour")
        assert (pipeline.cache.misses, pipeline.cache.hits) == (1, 1), "one prefix per image, whatever is asked"


def test_mixed_batch_equals_single_requests(pipeline):
    requests = [
        Request(REDDISH),
        Request(GREENISH, "opposite colour"),
        Request(BLUISH, "colour", prompt="{}"),
        Request(REDDISH, "opposite"),
        Request(GREENISH, prompt=""),
    ]
    together = [answer.token_ids for answer in pipeline.answer(requests)]
    alone = [pipeline.answer([request])[0].token_ids for request in requests]
    assert together == alone == [(A, RED), (A, RED), (A, BLUE), (A, BLUE), (A, GREEN)]


def test_more_requests_than_max_batch_are_split(pipeline, monkeypatch):
    sizes = count_runs(pipeline._decoder._language, monkeypatch)
    texts = [answer.text for answer in pipeline.caption([REDDISH, GREENISH, BLUISH, GREENISH])]
    assert texts == ["a red", "a green", "a blue", "a green"]
    assert max(sizes) == 3 and min(sizes) == 1


def test_an_image_that_repeats_is_encoded_once(tiny_bundle, monkeypatch):
    with runtime.load(tiny_bundle, cache_bytes=0) as pipeline:  # within a batch even without a cache
        vision = count_runs(pipeline._encoder._vision, monkeypatch)
        qformer = count_runs(pipeline._encoder._qformer, monkeypatch)
        answers = pipeline.answer([Request(REDDISH), Request(REDDISH.copy(), "opposite"), Request(REDDISH)])
    assert [answer.text for answer in answers] == ["a red", "a blue", "a red"]
    assert vision == [1], "one image"
    assert qformer == [2], "two different questions, None among them"


def test_a_second_question_reuses_the_features_and_a_second_asking_the_prefix(pipeline, monkeypatch):
    vision = count_runs(pipeline._encoder._vision, monkeypatch)
    qformer = count_runs(pipeline._encoder._qformer, monkeypatch)
    pipeline.vqa(REDDISH, "colour")
    pipeline.vqa(REDDISH, "opposite")
    assert (vision, qformer) == ([1], [1, 1])
    answer = pipeline.vqa(REDDISH, "opposite")
    assert (vision, qformer) == ([1], [1, 1])
    assert answer.text == "a blue"
    assert answer.timings_ms["vision"] == answer.timings_ms["qformer"] == 0.0


def test_prompts_and_images_share_one_bound(tiny_bundle):
    with runtime.load(tiny_bundle, cache_bytes=1 << 20) as pipeline:
        for image in (REDDISH, BLUISH, REDDISH):
            for prompt in ("photo of", "photo of", "photo of a"):
                pipeline.caption(image, prompt=prompt)
        counted = pipeline.statistics()
    assert counted["memory"]["max_bytes"] + counted["prompts"]["max_bytes"] == 1 << 20
    assert (counted["prompts"]["hits"], counted["prompts"]["misses"]) == (7, 2)
    assert 0 < counted["prompts"]["bytes"] <= counted["prompts"]["max_bytes"]
    with runtime.load(tiny_bundle, cache_bytes=0) as pipeline:
        texts = [pipeline.caption(image)[0].text for image in (REDDISH, BLUISH, REDDISH)]
        assert texts == ["a red", "a blue", "a red"]
        counted = pipeline.statistics()["prompts"]
    assert counted == dict.fromkeys(counted, 0)


def test_timings_and_json(pipeline):
    (answer,) = pipeline.answer([Request(REDDISH, "colour")])
    assert set(answer.timings_ms) == PHASES
    phases_ms = sum(answer.timings_ms[phase] for phase in PHASES - {"total"})
    assert 0 < phases_ms <= answer.timings_ms["total"]
    assert all(answer.timings_ms[phase] > 0 for phase in PHASES)
    assert set(answer.as_json()) == {"image", "question", "text", "token_ids", "timings_ms"}
    assert answer.as_json()["token_ids"] == [A, RED]
    assert answer.new_tokens == 2


def test_max_new_tokens(pipeline):
    assert pipeline.answer([Request(REDDISH)], max_new_tokens=1)[0].text == "a"
    for wrong in (0, 9):
        with pytest.raises(InputError, match="max_new_tokens: expected 1 to 8"):
            pipeline.answer([Request(REDDISH)], max_new_tokens=wrong)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request(REDDISH, prompt="say {}"), "expected no '{}' in a caption prompt"),
        (Request(REDDISH, "colour", prompt="say"), "expected exactly one '{}'"),
        (Request(REDDISH, "colour", prompt="{} {}"), "found 2"),
        (Request(REDDISH, " . "), "question: expected words"),
        (Request(REDDISH, "colour", prompt="photo " * 14 + "{}"), "positions, this bundle has 20"),
        (Request("nowhere.png"), "nowhere.png: expected an image file"),
    ],
)
def test_refusals(pipeline, request_, sentence):
    with pytest.raises(InputError, match="(?s)" + sentence.replace("{", r"\{").replace("}", r"\}")):
        pipeline.answer([Request(GREENISH), request_])
    assert pipeline.caption(GREENISH)[0].text == "a green", "a refused batch leaves the pipeline working"


def test_a_long_question_is_cut_for_the_qformer_and_keeps_its_end(pipeline):
    ids = pipeline._question_ids(Request(REDDISH, "colour " * 9))
    whole = pipeline._question_ids(Request(REDDISH, "colour " * 2))
    assert len(ids) == 4
    assert ids[-1] == whole[-1]
    assert pipeline.vqa(REDDISH, "colour " * 9).text == pipeline.vqa(REDDISH, "colour").text


def test_no_request_is_refused(pipeline):
    with pytest.raises(InputError, match="at least one request"):
        pipeline.caption([])
    with pytest.raises(ImageError):
        pipeline.caption([b"not an image"])


def test_a_braced_question_is_text_not_a_template(pipeline):
    assert pipeline.vqa(REDDISH, "colour {}").text == "a red"


def test_threads_share_a_pipeline(pipeline):
    images = {"a red": REDDISH, "a green": GREENISH, "a blue": BLUISH}
    wrong = []

    def ask(text, image):
        wrong.extend(answer.text for answer in pipeline.caption([image] * 20) if answer.text != text)

    threads = [threading.Thread(target=ask, args=pair) for pair in images.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_open_closes_what_was_open(make_tiny_bundle, tmp_path, monkeypatch):
    from runtime.backends.ort import OrtEngine

    path = make_tiny_bundle(tmp_path / "bundle")
    (path / "onnx/language.onnx").write_bytes(b"no graph")
    closed = []
    monkeypatch.setattr(OrtEngine, "close", lambda engine: closed.append(engine))
    with pytest.raises(runtime.errors.BundleError, match=r"language\.onnx"):
        Pipeline(read_bundle(path, check_hashes=False), device=Device(threads=1), cache_bytes=0)
    assert len(closed) == 3
