"""Bundles that search: their scores are transformers', padding changes nothing, and what they cannot do they say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import runtime
from export.config import ExportConfig
from export.retrieval_graphs import chosen_heads, graph_set
from export.retrieval_verify import draw_pairs, retrieval_feeds
from runtime.answers import Request
from runtime.backends import Device
from runtime.bundle import Bundle, read_bundle
from runtime.dataset import read_manifest
from runtime.errors import CheckFailed, CheckpointError, DataError, InputError
from runtime.recall import evaluate_retrieval
from runtime.replay import replay
from runtime.retrieval import Retrieval
from runtime.search import itc_scores
from runtime.text import normalise_caption
from tests.export.conftest import BOTH, CONFIG, FP32, QUIET, Export
from tests.hf_retrieval import hf_scores
from tests.plain import assert_plain
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint
from trainer.retrieval import EagerRetrieval

RETRIEVAL_GRAPHS = {"vision", "itc_image", "itc_text", "itm"}
SEARCHING = FP32.model_copy(update={"heads": "retrieval"})


@pytest.fixture(scope="module")
def both(bundle_both: Bundle) -> Bundle:
    return bundle_both


@pytest.fixture(scope="module")
def searching(export: Export, both: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(export(tmp_path_factory.mktemp("retrieval") / "only", SEARCHING, reuse=both.path))


@pytest.fixture(scope="module")
def images_and_texts(world: Path) -> tuple[list[Path], list[str]]:
    """Eight pictures and six captions of unequal length: 48 pairs."""
    rows = read_manifest(world / "captions_train.jsonl")
    captions = sorted({text for row in rows for text in row.captions}, key=len)
    texts = [normalise_caption(text) for text in captions[:: len(captions) // 6][:6]]
    assert len({len(text.split()) for text in texts}) > 2
    return [row.image for row in rows[:8]], texts


def scores(
    retriever: Retrieval | EagerRetrieval, images: list[Path], texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """ITC [images, texts] and ITM logits [images, texts, 2]; each image against all texts in one batch or more."""
    found = retriever.embed_images(images)
    itm = [retriever.match(np.stack([image] * len(texts)), texts) for image in found.image_embeds_BNE]
    return itc_scores(found.features_BQF, retriever.embed_texts(texts)), np.stack(itm)


def test_scores_equal_transformers(both: Bundle, searching: Bundle, model: Blip2, images_and_texts) -> None:
    """Unequal texts share a batch with us and are single with them."""
    images, texts = images_and_texts
    expected = hf_scores(model, images, texts)
    assert np.ptp(expected[0]) > 0.05, "scores that are all the same would prove nothing"
    assert np.ptp(expected[1][..., 1] - expected[1][..., 0]) > 0.05
    retrievers = [EagerRetrieval(model)]
    for bundle in (both, searching):
        retrievers.append(Retrieval(bundle, device=Device(threads=1)))
    for retriever in retrievers:
        itc, itm = scores(retriever, images, texts)
        np.testing.assert_allclose(itc, expected[0], atol=1e-5, rtol=0)
        np.testing.assert_allclose(itm, expected[1], atol=1e-5, rtol=0)


def test_a_text_in_a_batch_equals_the_text_alone(searching: Bundle, images_and_texts) -> None:
    images, texts = images_and_texts
    with Retrieval(searching, device=Device(threads=1)) as retrieval:
        together = retrieval.embed_texts(texts)
        alone = np.concatenate([retrieval.embed_texts([text]) for text in texts])
        embeds = retrieval.embed_images(images[: len(texts)]).image_embeds_BNE
        matched = retrieval.match(embeds, texts)
        singly = np.concatenate([retrieval.match(embeds[i : i + 1], [text]) for i, text in enumerate(texts)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(matched, singly, atol=1e-5)


def test_a_long_text_is_cut_as_in_training(searching: Bundle, model: Blip2) -> None:
    long = "a red circle and a blue square " * 6
    with Retrieval(searching, device=Device(threads=1)) as retrieval:
        (ids,) = retrieval.token_ids([long])
        assert len(ids) == model.config.qformer.max_text_tokens
        np.testing.assert_allclose(retrieval.embed_texts([long]), EagerRetrieval(model).embed_texts([long]), atol=1e-5)
        with pytest.raises(InputError, match="expected words to search with"):
            retrieval.embed_texts([" .!"])


def test_the_bundles_say_what_they_can(both: Bundle, searching: Bundle, bundle_fp32: Bundle, model: Blip2) -> None:
    assert set(searching.manifest.graphs) == RETRIEVAL_GRAPHS
    assert set(both.manifest.graphs) == RETRIEVAL_GRAPHS | set(bundle_fp32.manifest.graphs)
    assert (searching.manifest.model.style, both.manifest.model.style) == ("none", "decoder-only")
    assert searching.manifest.limits.max_text_tokens == model.config.qformer.max_text_tokens
    assert not searching.manifest.model.question_conditioned
    assert not (searching.path / "tokenizer.json").exists()
    with pytest.raises(InputError, match="this bundle searches and cannot answer"):
        runtime.load(searching.path)
    with pytest.raises(InputError, match="this bundle answers and cannot search"):
        runtime.load_retrieval(bundle_fp32.path)
    with runtime.load(both.path) as pipeline:
        assert pipeline.bundle.manifest.limits == bundle_fp32.manifest.limits.model_copy(
            update={"max_text_tokens": model.config.qformer.max_text_tokens}
        )


def test_their_graphs_are_plain_onnx(both: Bundle) -> None:
    assert_plain(both, ["itc_image", "itc_text", "itm"])


def test_they_replay_and_their_card_tells(both: Bundle, searching: Bundle) -> None:
    for bundle in (both, searching):
        checks = replay(bundle)
        assert {"itc_image/run", "itc_text/run", "itm/run", "retrieval"} <= {check.graph for check in checks}
        assert all(check.ok for check in checks)
        assert len({(check.graph, check.output) for check in checks}) == len(checks)
    assert "chain" not in {check.graph for check in checks}
    card = (searching.path / "README.md").read_text()
    assert "qforge search photos.index" in card
    assert "qforge caption" not in card
    assert "qforge caption" in (both.path / "README.md").read_text()
    parity = json.loads((searching.path / "parity.json").read_text())
    assert parity["retrieval_scores"]["pairs"] == 12
    assert parity["retrieval_scores"]["itc_max_error"] < 1e-5
    again = {check.output: check.max_error for check in checks if check.graph == "retrieval"}
    assert again["itc"] <= parity["retrieval_scores"]["itc_max_error"], "verify measures what the export measured"
    assert "greedy_answers" not in parity


def test_recall_is_the_same_with_eager_and_bundle(both: Bundle, model: Blip2, world: Path) -> None:
    rows = read_manifest(world / "captions_train.jsonl")
    eager = evaluate_retrieval(EagerRetrieval(model), rows, candidates=12, progress=QUIET)
    with Retrieval(both, device=Device(threads=1)) as retrieval:
        assert evaluate_retrieval(retrieval, rows, candidates=12, progress=QUIET) == eager
    assert (eager.images, len(eager.metrics)) == (24, 12)
    assert 0 < eager.metrics["itm_text_to_image_r10"] < 1, "scores of random weights are neither all right nor wrong"


def test_int8_is_quantised_and_close(export: Export, both: Bundle, tmp_path: Path, model, images_and_texts) -> None:
    config = CONFIG.model_copy(update={"heads": "retrieval"})
    bundle = read_bundle(export(tmp_path / "int8", config, precision="int8", reuse=both.path))
    assert_plain(bundle)
    assert bundle.manifest.language_precision == "fp32"
    images, texts = images_and_texts
    expected = scores(EagerRetrieval(model), images, texts)
    with Retrieval(bundle, device=Device(threads=1)) as retrieval:
        found = scores(retrieval, images, texts)
    for ours, eager in zip(found, expected, strict=True):
        error = np.abs(ours - eager).max()
        assert 1e-5 < error < 0.2 * np.abs(eager).max()
    for name in RETRIEVAL_GRAPHS:
        assert bundle.manifest.graphs[name].bytes < both.manifest.graphs[name].bytes


def test_what_was_trained_last_decides(model: Blip2) -> None:
    assert chosen_heads(model, None, "stage1") == "retrieval"
    assert chosen_heads(model, None, "stage2") == chosen_heads(model, None, "vqa") == "generate"
    assert chosen_heads(model, "both", "vqa") == "both"


def test_a_model_without_language_searches_and_nothing_else(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    model.language_model = None
    assert chosen_heads(model, None, "vqa") == "retrieval"
    assert set(graph_set(model, "retrieval").all) == RETRIEVAL_GRAPHS
    unprojected = load_checkpoint(checkpoint)
    unprojected.bridge.parts -= {"language"}
    assert chosen_heads(unprojected, None, "vqa") == "retrieval"
    with pytest.raises(InputError, match="expected retrieval, found generate: this checkpoint has no language model"):
        chosen_heads(model, "generate", "stage1")


@pytest.mark.parametrize("part", ["text", "contrast", "matching"])
def test_a_bridge_without_a_head_is_refused(part: str, checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    model.bridge.parts -= {part}
    with pytest.raises(CheckpointError, match=f"this checkpoint lacks the part '{part}'.*--text-from"):
        graph_set(model, "retrieval")
    with pytest.raises(CheckpointError, match=f"lacks the part '{part}'"):
        EagerRetrieval(model)


def test_pairs_are_real_captions_right_and_wrong(manifests: list[Path], world: Path) -> None:
    rows = {row.image: row.captions for row in read_manifest(world / "captions_train.jsonl")}
    requests = [Request(image) for image in list(rows)[:5] for _ in range(2)]
    pairs = draw_pairs(manifests, requests, seed=3)
    assert pairs == draw_pairs(manifests, requests, seed=3)
    assert [pair.image for pair in pairs] == [image for image in list(rows)[:5] for _ in range(2)]
    assert all(pair.text in rows[pair.image] for pair in pairs[::2])
    assert not any(pair.text in rows[pair.image] for pair in pairs[1::2])
    with pytest.raises(DataError, match="expected at least two, found 0"):
        draw_pairs([world / "vqa_train.jsonl"], requests, seed=3)


def test_calibration_feeds_are_what_serving_gives(
    model: Blip2, manifests: list[Path], world: Path, tmp_path: Path
) -> None:
    images = [row.image for row in read_manifest(world / "captions_train.jsonl")][:3]
    pairs = draw_pairs(manifests, [Request(image) for image in images], seed=0)
    feeds = retrieval_feeds(model, graph_set(model, "retrieval").searching, pairs, tmp_path)
    assert {name: len(of) for name, of in feeds.items()} == {"vision": 3, "itc_image": 3, "itc_text": 6, "itm": 6}
    eager = EagerRetrieval(model)
    embeds = eager.embed_images(images).image_embeds_BNE
    np.testing.assert_allclose(feeds["itm"][2]["image_embeds"][0], embeds[1], atol=1e-5)
    assert feeds["itm"][3]["text_ids"].tolist() == [model.text_tokenizer(normalise_caption(pairs[3].text)).input_ids]


def test_questions_are_not_needed_to_search(export: Export, both: Bundle, world: Path, tmp_path: Path) -> None:
    captions = [world / "captions_train.jsonl"]
    read_bundle(export(tmp_path / "bundle", SEARCHING, calibration=captions, reuse=both.path))
    with pytest.raises(DataError, match="the model reads questions"):
        export(tmp_path / "other", BOTH, calibration=captions)


def test_scores_too_far_off_leave_nothing(
    export: Export, both: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every graph right and the whole wrong: a text that the bundle reads otherwise than the trainer."""
    monkeypatch.setattr("runtime.retrieval.Retrieval.token_ids", lambda self, texts: [[2, 5, 3]] * len(texts))
    with pytest.raises(CheckFailed, match=r"it[cm] scores of the finished bundle are up to"):
        export(tmp_path / "out", SEARCHING, reuse=both.path)
    assert not list(tmp_path.iterdir())


def test_a_bundle_written_before_retrieval_still_loads(bundle_fp32: Bundle, tmp_path: Path) -> None:
    from runtime.bundle import _digest, _render

    copy = shutil.copytree(bundle_fp32.path, tmp_path / "old")
    record = json.loads((copy / "manifest.json").read_text())
    del record["limits"]["max_text_tokens"]
    record["digest"] = _digest(record)
    (copy / "manifest.json").write_text(_render(record))
    assert read_bundle(copy).manifest.limits.max_text_tokens == 0


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="heads"):
        ExportConfig(heads="search")
