"""What the cache may share and what it must keep apart, with engines that count."""

import numpy as np
import pytest

from runtime.bundle import read_bundle
from runtime.image_encoder import ImageEncoder, open_encoder, pad_questions
from runtime.query_cache import QueryCache
from runtime.stopwatch import Stopwatch


class CountingVision:
    """Features are the mean of the pixels plus what tells this bundle's weights from another's."""

    def __init__(self, weight):
        self.weight, self.images = weight, 0

    def run(self, feeds):
        self.images += len(feeds["pixels"])
        return {"image_embeds": feeds["pixels"].mean(axis=(2, 3))[:, None] + np.float32(self.weight)}


class CountingQFormer:
    """The prefix is the features plus the sum of the question's ids."""

    rows = 0

    def run(self, feeds):
        self.rows += len(feeds["image_embeds"])
        question_B = (feeds["question_ids"] * feeds["question_mask"]).sum(axis=1).astype(np.float32)
        return {"prefix": feeds["image_embeds"] + question_B[:, None, None]}


class CountingFused:
    """What the two others give for no question; with the features where a question may follow."""

    def __init__(self, gives_embeds):
        self.gives_embeds, self.images = gives_embeds, 0

    def run(self, feeds):
        self.images += len(feeds["pixels"])
        embeds_BNE = feeds["pixels"].mean(axis=(2, 3))[:, None]
        return {"prefix": embeds_BNE} | ({"image_embeds": embeds_BNE} if self.gives_embeds else {})


@pytest.fixture
def manifest(tiny_bundle):
    return read_bundle(tiny_bundle).manifest


def images(*values):
    return np.stack([np.full((3, 4, 4), value, np.float32) for value in values])


def test_bundles_and_preprocessings_do_not_share_entries(manifest):
    cache = QueryCache(max_bytes=1 << 20)
    other_pixels = manifest.preprocess.model_copy(update={"resample": "lanczos"})
    others = [
        manifest,
        manifest.model_copy(update={"digest": "another"}),
        manifest.model_copy(update={"preprocess": other_pixels}),
    ]
    for weight, other in enumerate(others):
        encoder = ImageEncoder(CountingVision(weight), CountingQFormer(), cache, other)
        prefix_BQD = encoder.encode(images(1), [None], Stopwatch())
        assert prefix_BQD.ravel().tolist() == [1.0 + weight] * 3


def test_rows_come_back_in_order_and_each_piece_of_work_is_done_once(manifest):
    vision, qformer = CountingVision(0), CountingQFormer()
    encoder = ImageEncoder(vision, qformer, QueryCache(max_bytes=1 << 20), manifest)
    batch, questions = images(1, 2, 1, 1, 2), [None, (5,), (7, 8), None, None]
    expected = [1.0, 7.0, 16.0, 1.0, 2.0]
    assert encoder.encode(batch, questions, Stopwatch())[:, 0, 0].tolist() == expected
    assert (vision.images, qformer.rows) == (2, 4)
    assert encoder.encode(batch[::-1], questions[::-1], Stopwatch())[:, 0, 0].tolist() == expected[::-1]
    assert encoder.encode(images(1, 3), [(9,), None], Stopwatch())[:, 0, 0].tolist() == [10.0, 3.0]
    assert (vision.images, qformer.rows) == (3, 6)


def test_the_fused_graph_makes_captions_and_fills_the_same_cache(manifest):
    vision, qformer, fused = CountingVision(0), CountingQFormer(), CountingFused(gives_embeds=True)
    encoder = ImageEncoder(vision, qformer, QueryCache(max_bytes=1 << 20), manifest, fused)

    def prefixes(values, questions):
        return encoder.encode(images(*values), questions, Stopwatch())[:, 0, 0].tolist()

    assert prefixes([1, 2, 1], [None, None, None]) == [1.0, 2.0, 1.0]
    assert (fused.images, vision.images, qformer.rows) == (2, 0, 0)
    assert prefixes([1, 2], [None, (5,)]) == [1.0, 7.0]  # a remembered prefix; remembered features
    assert (fused.images, vision.images, qformer.rows) == (2, 0, 1)
    assert prefixes([3, 3, 4], [(1,), None, None]) == [4.0, 3.0, 4.0]  # 3 is asked about too: one pass through vision
    assert (fused.images, vision.images, qformer.rows) == (3, 1, 3)
    assert prefixes([5], [(1,)]) == [6.0] and prefixes([5], [None]) == [5.0]  # seen with a question before
    assert (fused.images, vision.images) == (3, 2)


def test_the_fused_graph_alone_serves_a_model_that_reads_no_question(make_tiny_bundle, tmp_path):
    manifest = read_bundle(make_tiny_bundle(tmp_path / "plain", question_conditioned=False)).manifest
    plain = manifest.model_copy(update={"graphs": manifest.graphs | {"fused": manifest.graphs["vision"]}})
    opened, fused = [], CountingFused(gives_embeds=False)
    encoder = open_encoder(plain, lambda name: opened.append(name) or fused, QueryCache(max_bytes=1 << 20))
    for _ in range(2):
        assert encoder.encode(images(1, 2), [None, None], Stopwatch())[:, 0, 0].tolist() == [1.0, 2.0]
    assert opened == ["fused"] and fused.images == 2


def test_questions_are_padded_on_the_right_and_none_is_masked():
    ids_BT, mask_BT = pad_questions([(5, 6, 7), None, (8,)])
    assert ids_BT.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert mask_BT.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert ids_BT.dtype == mask_BT.dtype == np.int64
    assert [array.shape for array in pad_questions([None, None])] == [(2, 1), (2, 1)]
