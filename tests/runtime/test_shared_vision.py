"""An image pays for vision once: in a batch, in turns, in the next process; and never with another's figures."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.answers import Request
from runtime.backends import CPU
from runtime.bundle import read_bundle
from runtime.disk_cache import DiskCache
from runtime.errors import DataError, InputError
from runtime.image_encoder import ImageEncoder, open_encoder
from runtime.preprocess import preprocess
from runtime.progress import Progress
from runtime.query_cache import QueryCache
from runtime.stopwatch import Stopwatch
from runtime.warm import warm_up

ROOT = Path(__file__).parents[2]
QUESTIONS = ["colour", "opposite", "colour of photo", "opposite photo"]
ANSWERS = ["a red", "a blue", "a red", "a blue"]
WARM = """
import sys
from pathlib import Path
from qforge.cli import main
main()
"""


def picture(red, green, blue):
    return np.full((5, 7, 3), (red, green, blue), np.uint8)


REDDISH, GREENISH = picture(250, 90, 10), picture(20, 200, 90)


class Counting:
    """Counts the images that go through a graph."""

    def __init__(self, engine):
        self.engine, self.images = engine, 0

    def run(self, feeds):
        self.images += len(next(iter(feeds.values())))
        return self.engine.run(feeds)


def count(pipeline, monkeypatch):
    vision, qformer = Counting(pipeline._encoder._vision), Counting(pipeline._encoder._qformer)
    monkeypatch.setattr(pipeline._encoder, "_vision", vision)
    monkeypatch.setattr(pipeline._encoder, "_qformer", qformer)
    return vision, qformer


def ask(pipeline, image, questions):
    return [answer.text for answer in pipeline.answer([Request(image, question) for question in questions])]


@pytest.mark.parametrize("in_turns", [False, True])
def test_many_questions_pay_vision_once_and_the_next_process_not_at_all(tiny_bundle, tmp_path, monkeypatch, in_turns):
    """More questions than a batch holds, without memory: what is shared is on the disk."""
    for first in (True, False):
        with runtime.load(tiny_bundle, cache_bytes=0, cache_dir=tmp_path) as pipeline:
            vision, qformer = count(pipeline, monkeypatch)
            if in_turns:
                assert [pipeline.vqa(REDDISH, question).text for question in QUESTIONS] == ANSWERS
            else:
                assert ask(pipeline, REDDISH, QUESTIONS) == ANSWERS
            assert (vision.images, qformer.images) == ((1, 4) if first else (0, 0))
            disk = pipeline.cache.statistics()["disk"]
            assert disk["hits"] + disk["misses"] == pipeline.cache.hits + pipeline.cache.misses > 0
            assert disk["writes"] == (5 if first else 0), "the features, and a prefix for each question"
            assert first or disk["misses"] == 0


def test_a_new_question_in_a_new_process_pays_the_qformer_alone(tiny_bundle, tmp_path, monkeypatch):
    with runtime.load(tiny_bundle, cache_dir=tmp_path) as pipeline:
        pipeline.vqa(REDDISH, "colour")
    with runtime.load(tiny_bundle, cache_dir=tmp_path) as pipeline:
        vision, qformer = count(pipeline, monkeypatch)
        assert ask(pipeline, REDDISH, ["opposite"]) == ["a blue"]
        assert (vision.images, qformer.images) == (0, 1)
        assert pipeline.vqa(REDDISH, "photo").text == "a red"
        tiers = pipeline.cache.statistics()
        assert (tiers["memory"]["hits"], tiers["disk"]["hits"]) == (1, 1), "what came from the disk stays in memory"


def test_one_process_warms_and_another_only_hits(tiny_bundle, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, image in {"red.png": REDDISH, "green.png": GREENISH}.items():
        Image.fromarray(image).save(photos / name)
    command = [sys.executable, "-c", WARM, "cache", "warm", tiny_bundle, photos, "--cache-dir", tmp_path / "seen"]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 images, 2 of them new" in done.stdout
    with runtime.load(tiny_bundle, cache_dir=tmp_path / "seen") as pipeline:
        vision, qformer = count(pipeline, monkeypatch)
        answers = pipeline.caption([photos / "red.png", photos / "green.png"])
        assert [answer.text for answer in answers] == ["a red", "a green"]
        assert (vision.images, qformer.images, pipeline.cache.misses, pipeline.cache.hits) == (0, 0, 0, 2)
        assert pipeline.vqa(photos / "red.png", "opposite").text == "a blue"
        assert (vision.images, qformer.images) == (0, 1), "the question is new, the image is not"


def test_warming_again_computes_nothing_and_repairs_what_is_damaged(tiny_bundle, tmp_path):
    bundle = read_bundle(tiny_bundle)
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.fromarray(picture(40 * number, 0, 0)).save(path)
    (tmp_path / "broken.png").write_bytes(b"no image")

    def warm(**options):
        cache = DiskCache(tmp_path / "seen", bundle.manifest.digest, CPU)
        given = [*paths, paths[0], tmp_path / "broken.png"]
        done = warm_up(bundle, given, cache, device=CPU, progress=Progress(quiet=True), **options)
        assert list(done.broken) == [str(tmp_path / "broken.png")] and done.images == 5
        return done.new, cache.statistics()["disk"]

    new, disk = warm()
    assert (new, disk["writes"]) == (5, 10)
    new, disk = warm()
    assert (new, disk["writes"], disk["misses"]) == (0, 0, 0)
    for entry in DiskCache(tmp_path / "seen", bundle.manifest.digest, CPU).folder.entries():
        os.truncate(entry.path, 50)
    _, disk = warm()
    assert (disk["writes"], disk["discarded"]) == (10, 10)
    with pytest.raises(InputError, match=r"expected 8 .* found 9"):
        warm(image_size=9)
    cache = DiskCache(tmp_path / "seen", bundle.manifest.digest, CPU)
    for images, sentence in ([[], "at least one image"], [[tmp_path / "broken.png"], "none of the 1 images"]):
        with pytest.raises(DataError, match=sentence):
            warm_up(bundle, images, cache, device=CPU, progress=Progress(quiet=True))


def test_a_bundle_that_reads_no_question_keeps_prefixes_alone(make_tiny_bundle, tmp_path, monkeypatch):
    bundle = read_bundle(make_tiny_bundle(tmp_path / "plain", question_conditioned=False))
    Image.fromarray(REDDISH).save(tmp_path / "red.png")
    cache = DiskCache(tmp_path / "seen", bundle.manifest.digest, CPU)
    assert warm_up(bundle, [tmp_path / "red.png"], cache, device=CPU, progress=Progress(quiet=True)).new == 1
    assert cache.statistics()["disk"]["writes"] == 1
    with runtime.load(bundle.path, cache_dir=tmp_path / "seen") as pipeline:
        vision, qformer = count(pipeline, monkeypatch)
        assert pipeline.vqa(tmp_path / "red.png", "opposite").text == "a red"
        assert (vision.images, qformer.images) == (0, 0)


class Recording(QueryCache):
    """Remembers every key it was given."""

    def __init__(self):
        super().__init__(1 << 20)
        self.keys = []

    def put(self, key, array):
        self.keys.append(key)
        super().put(key, array)


def test_no_two_inputs_have_one_key(tiny_bundle, tmp_path):
    """Same bytes, other mode, shape, type, size, settings, bundle or question."""
    bundle = read_bundle(tiny_bundle)
    manifest, cache = bundle.manifest, Recording()
    raw = bytes(range(0, 192, 4))  # 48 bytes
    images = [
        Image.frombytes("L", (8, 6), raw),
        Image.frombytes("L", (6, 8), raw),
        Image.frombytes("RGB", (4, 4), raw),
        Image.frombytes("RGBA", (4, 3), raw),
        Image.frombytes("CMYK", (4, 3), raw),
        Image.frombytes("LA", (6, 4), raw),
        Image.frombytes("P", (8, 6), raw),
        Image.frombytes("I;16", (6, 4), raw),
    ]
    images[6].putpalette([255 - value // 3 for value in range(768)])
    settings = manifest.preprocess
    plain = preprocess(REDDISH, settings)
    pixels = [
        *(preprocess(image, settings) for image in images),
        plain,
        plain.reshape(3, 4, 16),
        plain.view(np.int32),
        preprocess(REDDISH, settings.at(16)),
        preprocess(REDDISH, settings.model_copy(update={"std": (0.5, 1.0, 1.0)})),
    ]
    manifests = [
        manifest,
        manifest.model_copy(update={"digest": "0" * 64}),
        manifest.model_copy(update={"preprocess": settings.model_copy(update={"resample": "lanczos"})}),
        manifest.model_copy(update={"preprocess": settings.at(16)}),
    ]

    class Anything:
        def run(self, feeds):
            rows = len(next(iter(feeds.values())))
            return {"image_embeds": np.zeros((rows, 1, 3), np.float32), "prefix": np.zeros((rows, 2, 3), np.float32)}

    questions = [None, (), (5,), (5, 0), (5, 6)]
    for one in manifests:
        encoder = ImageEncoder(Anything(), Anything(), cache, one)
        for array in pixels:
            for question in questions:
                encoder.encode(array[None], [question], Stopwatch())
    assert len(cache.keys) == len(set(cache.keys)) == len(manifests) * len(pixels) * (1 + len(questions))


def test_two_bundles_in_one_folder_answer_for_themselves(make_tiny_bundle, tiny_bundle, tmp_path):
    plain = make_tiny_bundle(tmp_path / "plain", question_conditioned=False)
    for _ in range(2):
        for bundle, text in ((tiny_bundle, "a blue"), (plain, "a red")):
            with runtime.load(bundle, cache_dir=tmp_path / "seen") as pipeline:
                assert pipeline.vqa(REDDISH, "opposite").text == text


def test_damage_and_a_full_disk_do_not_reach_the_answer(tiny_bundle, tmp_path):
    with runtime.load(tiny_bundle, cache_dir=tmp_path) as pipeline:
        assert ask(pipeline, REDDISH, QUESTIONS) == ANSWERS
        for entry in pipeline.cache._disk.folder.entries():
            entry.path.write_bytes(entry.path.read_bytes()[:-1] + b"?")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with runtime.load(tiny_bundle, cache_dir=tmp_path) as pipeline:
            assert ask(pipeline, REDDISH, QUESTIONS) == ANSWERS
            disk = pipeline.cache.statistics()["disk"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert disk["discarded"] == 5 and disk["hits"] == 0 and disk["problem"] is not None


def test_a_features_file_is_not_needed_by_the_fused_graph_alone(make_tiny_bundle, tmp_path):
    """Even where a file bears the name of features that such a bundle never writes."""
    manifest = read_bundle(make_tiny_bundle(tmp_path / "plain", question_conditioned=False)).manifest
    manifest = manifest.model_copy(update={"graphs": manifest.graphs | {"fused": manifest.graphs["vision"]}})

    class Fused:
        def run(self, feeds):
            return {"prefix": feeds["pixels"].mean(axis=(2, 3))[:, None]}

    class Full(QueryCache):
        def __contains__(self, key):
            return True

    encoder = open_encoder(manifest, lambda name: Fused(), Full(1 << 20))
    pixels_BCHW = np.ones((1, 3, 8, 8), np.float32)
    assert encoder.encode(pixels_BCHW, [None], Stopwatch()).tolist() == [[[1.0, 1.0, 1.0]]]


def test_the_bound_of_memory_is_the_memory(tmp_path):
    """Measured by the allocator, in prefixes of BLIP-2's size."""
    import tracemalloc

    bound, array = 6_000_000, np.zeros((32, 768), np.float32)
    tracemalloc.start()
    try:
        cache = QueryCache(bound)
        before, _ = tracemalloc.get_traced_memory()
        for number in range(200):
            cache.put(str(number), array)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert cache.statistics()["memory"] == {
        "hits": 0,
        "misses": 0,
        "evictions": 139,
        "entries": 61,
        "bytes": 61 * array.nbytes,
        "max_bytes": bound,
    }
    assert abs(taken - bound) < 0.02 * bound


def test_threads_share_a_folder_through_a_pipeline(tiny_bundle, tmp_path):
    import threading

    with runtime.load(tiny_bundle, cache_bytes=500, cache_dir=tmp_path, cache_dir_bytes=1500, threads=1) as pipeline:
        images = [picture(*np.roll((250, 90, 10), turn)) for turn in range(3)]
        wrong = []

        def work(offset):
            for step in range(10):
                turn = (offset + step) % 3
                text = pipeline.vqa(images[turn], "opposite" if step % 2 else "colour").text
                names = ("red", "green", "blue")
                expected = names[turn] if step % 2 == 0 else names[(turn + 2) % 3]
                if text != f"a {expected}":
                    wrong.append((turn, step, text))

        threads = [threading.Thread(target=work, args=(offset,)) for offset in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tiers = pipeline.cache.statistics()
    assert not wrong
    assert tiers["disk"]["bytes"] <= 1500 and tiers["disk"]["evictions"] > 0 and tiers["disk"]["failures"] == 0
