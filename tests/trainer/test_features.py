"""Features kept on the disk: the tower is spared, nothing foreign or changed hits, what cannot be kept is refused."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.errors import DataError, InputError
from runtime.files import sha256_of
from runtime.progress import Progress
from tests.tiny import write_tiny_halves
from trainer.blip2 import Blip2
from trainer.config import ModelConfig
from trainer.data import FeatureSource, FeatureStore, ImageRows, encode, resolve
from trainer.data_config import AugmentConfig, DataConfig, FeaturesConfig
from trainer.feature_cache import LEDGER, FeatureCache
from trainer.feature_key import tower_facts
from trainer.feature_shards import DIGEST_BYTES
from trainer.features import CachedFeatures, cached_features
from trainer.ranks import Ranks
from trainer.stage_config import Stage1Config
from trainer.towers import VisionTower, load_vision
from trainer.train import run_stage
from trainer.watch import StepReport, Watcher

QUIET = Progress(quiet=True)
PLENTY = 10**9


@pytest.fixture
def vision(model_config: ModelConfig) -> VisionTower:
    return load_vision(model_config.vision, model_config.vision_layer)


@pytest.fixture
def images(world: Path) -> list[Path]:
    return sorted((world / "images").glob("train-*.png"))[:10]


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images passed a tower, call by call."""
    calls, forward = list[int](), VisionTower.forward

    def counting(self: VisionTower, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels_BCHW))
        return forward(self, pixels_BCHW)

    monkeypatch.setattr(VisionTower, "forward", counting)
    yield calls


def test_a_second_process_spares_the_tower(vision, images, passed, tmp_path) -> None:
    first = CachedFeatures(tmp_path / "cache", PLENTY)
    made = first.many(vision, images)
    assert passed == [10], "what is absent passes the tower together"
    expected = encode(vision, [FeatureStore().pixels(vision, path) for path in images])
    torch.testing.assert_close(torch.stack(made), expected.half().float(), rtol=0, atol=0)
    again = CachedFeatures(tmp_path / "cache", PLENTY)
    del passed[:]
    assert all(torch.equal(a, b) for a, b in zip(made, again.many(vision, images[::-1])[::-1], strict=True))
    assert passed == []
    row_bytes = 32 + 16 + 2 * made[0].numel()
    assert first.statistics() == {"hits": 0, "misses": 10, "stored": 10, "bytes": 10 * row_bytes}
    assert again.statistics() == {"hits": 10, "misses": 0, "stored": 0, "bytes": 10 * row_bytes}


def test_two_users_of_one_folder_see_each_others_rows(vision, images, passed, tmp_path) -> None:
    one, other = (CachedFeatures(tmp_path / "cache", PLENTY) for _ in range(2))
    one.many(vision, images[:3])
    other.many(vision, images[3:6])
    del passed[:]
    one.many(vision, images[:8])
    other.many(vision, images[:8])
    assert passed == [2], "only the two images that nobody had seen"


def test_reading_ahead_changes_nothing(vision, images, passed, tmp_path) -> None:
    """As the loop does: the next step is read ahead before this one is taken; a step may ask for less than was read."""
    steps = [images[:4], images[2:6], images[3:9]]
    plain, early = (CachedFeatures(tmp_path / name, PLENTY) for name in ("plain", "early"))
    expected = [plain.many(vision, step) for step in steps]
    one_after_the_other = passed[:]
    del passed[:]
    early.ahead(vision, [*steps[0], images[9]])
    for number, step in enumerate(steps):
        early.ahead(vision, (*steps, images[:1])[number + 1])
        assert len(early._waiting) == 2
        found = early.many(vision, step)
        assert len(early._waiting) == 1, "what was read ahead was taken"
        assert all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True))
    assert passed == one_after_the_other == [4, 2, 3]


def test_what_is_made_meanwhile_is_not_made_again(vision, images, passed, tmp_path) -> None:
    store = CachedFeatures(tmp_path / "cache", PLENTY)
    store.ahead(vision, images[:6])
    store._waiting[0][1].result()
    store.many(vision, images[2:8])
    found = store.many(vision, images[:6])
    assert passed == [6, 2]
    assert all(torch.equal(a, b) for a, b in zip(found[2:], store.many(vision, images[2:6]), strict=True))


def test_a_changed_image_does_not_hit_and_a_moved_one_does(vision, images, passed, tmp_path) -> None:
    picture, moved = tmp_path / "picture.bmp", tmp_path / "moved.bmp"
    Image.new("RGB", (8, 8), (250, 0, 0)).save(picture)
    facts = picture.stat()
    store = CachedFeatures(tmp_path / "cache", PLENTY)
    (red,) = store.many(vision, [picture])
    shutil.copy(picture, moved)
    Image.new("RGB", (8, 8), (0, 0, 250)).save(picture)
    os.utime(picture, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (picture.stat().st_size, picture.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    del passed[:]
    blue, again = store.many(vision, [picture, moved])
    assert passed == [1]
    assert torch.equal(red, again)
    assert not torch.equal(red, blue)


def test_other_towers_do_not_hit(model_config, vision, images, passed, tmp_path) -> None:
    """Weights, layer, image size, interpolation and normalisation count; where the folder lies does not."""
    cache = tmp_path / "cache"
    CachedFeatures(cache, PLENTY).many(vision, images)

    def asked(tower: VisionTower) -> int:
        before = len(passed)
        CachedFeatures(cache, PLENTY).many(tower, images)
        return sum(passed[before:])

    halves = tmp_path / "moved"
    shutil.copytree(Path(model_config.vision), halves)
    assert asked(load_vision(str(halves), -1)) == 0
    assert asked(load_vision(str(halves), -2)) == len(images)
    assert asked(load_vision(str(halves), -1, 24)) == len(images)
    stored = json.loads((halves / "preprocessor_config.json").read_text())
    for change in ({"resample": 2}, {"image_mean": [0.5, 0.5, 0.5]}):
        (halves / "preprocessor_config.json").write_text(json.dumps(stored | change))
        assert asked(load_vision(str(halves), -1)) == len(images)
    other = write_tiny_halves(tmp_path / "other", seed=1)
    assert asked(load_vision(other.vision, -1)) == len(images)
    assert asked(load_vision(other.vision, -1)) == 0


def test_a_trained_tower_is_refused(vision, images, tmp_path) -> None:
    store = CachedFeatures(tmp_path / "cache", PLENTY)
    vision.model.requires_grad_(True)
    with pytest.raises(InputError, match=r"data.features.folder: features of an image encoder that is trained"):
        store.prepare(vision, images, QUIET)


def test_features_too_large_for_halves_are_refused(vision, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(VisionTower, "forward", lambda self, pixels: torch.full((len(pixels), 2, 3), 7e4))
    with pytest.raises(InputError, match=r"train-00000.png: a feature is not a number or too large"):
        CachedFeatures(tmp_path / "cache", PLENTY).many(vision, images)


def test_the_bound_holds_and_the_rest_is_made_each_time(vision, images, passed, tmp_path, capsys) -> None:
    row_bytes = 32 + 16 + 2 * encode(vision, [FeatureStore().pixels(vision, images[0])]).numel()
    limit = 4 * row_bytes + row_bytes // 2
    store = CachedFeatures(tmp_path / "cache", limit)
    store.fill(vision, images, len(images), Progress())
    assert "holds its data.features.limit_gb" in capsys.readouterr().err
    assert store.statistics()["stored"] == 4
    files = [file for file in (tmp_path / "cache").rglob("*") if file.suffix in {".rows", ".index"}]
    assert sum(file.stat().st_size for file in files) == 4 * row_bytes <= limit
    del passed[:]
    exact = CachedFeatures(tmp_path / "plenty", PLENTY).many(vision, images)
    del passed[:]
    for found, expected in zip(store.many(vision, images), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-6)  # they passed the tower in another batch
    assert passed == [6]
    again = CachedFeatures(tmp_path / "cache", 6 * row_bytes)
    again.many(vision, images)
    assert again.statistics() == {"hits": 4, "misses": 6, "stored": 2, "bytes": 6 * row_bytes}


def test_broken_images_are_named_and_left_out(vision, images, tmp_path) -> None:
    broken, missing, twin = tmp_path / "broken.png", tmp_path / "missing.png", tmp_path / "twin.png"
    broken.write_bytes(b"not a picture")
    twin.write_bytes(b"not a picture")
    store = CachedFeatures(tmp_path / "cache", PLENTY)
    found = store.many(vision, [broken, images[0], missing, twin, images[0]])
    assert [features is None for features in found] == [True, False, True, True, False]
    assert torch.equal(found[1], found[4])
    assert store.broken.keys() == {broken, missing, twin}
    assert all(why.startswith(f"{path}: expected an image") for path, why in store.broken.items())


def test_rows_are_those_of_memory(vision, world, tmp_path) -> None:
    """The same rows, replaced ones included, and the same features up to half precision."""
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    for name in ("train-00003.png", "train-00004.png"):
        (copy / "images" / name).write_bytes(b"not a picture")
    rows = resolve(DataConfig(), copy).captions()[0]
    kept = ImageRows(vision, rows, CachedFeatures(tmp_path / "cache", PLENTY), QUIET)
    exact = ImageRows(vision, rows, FeatureStore(), QUIET)
    for indices in ([2, 3, 4, 5], [0, 4]):
        (kept_rows, kept_BNE), (exact_rows, exact_BNE) = kept.batch(indices, None), exact.batch(indices, None)
        assert kept_rows == exact_rows
        torch.testing.assert_close(kept_BNE, exact_BNE, rtol=2**-11, atol=2**-24)
    assert kept.broken() == exact.broken()


def test_changed_images_are_refused(vision, world, tmp_path) -> None:
    rows = resolve(DataConfig(), world).captions()[0]
    with pytest.raises(InputError, match=r"data.features.folder: features are kept"):
        ImageRows(vision, rows, CachedFeatures(tmp_path / "cache", PLENTY), QUIET, AugmentConfig(flip=True))


def test_no_folder_is_no_cache() -> None:
    with pytest.raises(InputError, match=r"data.features.folder: expected a folder"):
        cached_features(FeaturesConfig())


def test_foreign_folders_are_refused(vision, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="found other files"):
        FeatureCache(tmp_path / "mine", {}, PLENTY)
    with pytest.raises(InputError, match="found a file"):
        FeatureCache(tmp_path / "mine" / "thesis.txt", {}, PLENTY)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / LEDGER).write_text('{"format": 9, "bytes": 0}')
    with pytest.raises(DataError, match="expected format 1, found 9"):
        FeatureCache(tmp_path / "new", {}, PLENTY)


def digest(*numbers: int) -> bytes:
    return hashlib.sha256(repr(numbers).encode()).digest()[:DIGEST_BYTES]


def _open_at_once(folder: Path, started: "multiprocessing.synchronize.Barrier", number: int) -> None:
    started.wait()
    cache = FeatureCache(folder, {"tower": "t"}, PLENTY)
    for place in range(20):
        cache.write([digest(number, place)], np.full((1, 3, 5), number * 100 + place, np.float16))
    cache.close()


def test_processes_may_open_a_new_folder_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Barrier(4)
    processes = [context.Process(target=_open_at_once, args=(tmp_path / "c", started, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = FeatureCache(tmp_path / "c", {"tower": "t"}, PLENTY)
    assert cache.statistics.bytes == 80 * (32 + 16 + 30)
    for n in range(4):
        found = cache.read([digest(n, place) for place in range(20)])
        assert {place: float(halves[0, 0]) for place, halves in found.items()} == {p: n * 100 + p for p in range(20)}


def _same_at_once(folder: Path, started: "multiprocessing.synchronize.Barrier") -> None:
    cache = FeatureCache(folder, {"tower": "t"}, PLENTY)
    for step in range(20):
        digests = [digest(step, place) for place in range(8)]
        started.wait()
        assert cache.read(digests) == {}, "another step's"
        started.wait()
        cache.write(digests, np.full((8, 3, 5), step, np.float16))
        assert all((halves == step).all() for halves in cache.read(digests).values())
    cache.close()


def test_processes_that_meet_an_image_at_once_store_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Barrier(3)
    processes = [context.Process(target=_same_at_once, args=(tmp_path / "c", started)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    rows = [file.stat().st_size for file in (tmp_path / "c").rglob("*") if file.suffix in {".rows", ".index"}]
    assert sum(rows) == 20 * 8 * (32 + 16 + 30)
    assert FeatureCache(tmp_path / "c", {"tower": "t"}, PLENTY).statistics.bytes == sum(rows)


def test_what_others_wrote_meanwhile_is_not_written_again_unless_damaged(tmp_path: Path) -> None:
    one, other = (FeatureCache(tmp_path / "c", {}, PLENTY) for _ in range(2))
    values = np.arange(30, dtype=np.float16).reshape(2, 3, 5)
    assert one.read([digest(0)]) == other.read([digest(0)]) == {}
    one.write([digest(0)], values[:1])
    other.write([digest(0), digest(1)], values)
    assert (one.statistics.stored, other.statistics.stored, other.statistics.misses) == (1, 1, 2)
    (data,) = (file for file in (tmp_path / "c").glob("*/*.rows") if file.read_bytes()[:16] == digest(0))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert one.read([digest(0)]) == {}
    one.write([digest(0)], values[:1])
    assert one.statistics.stored == 2
    assert np.array_equal(other.read([digest(0)])[0], values[0])


ENDLESS = """
import sys, hashlib, itertools, numpy as np
from pathlib import Path
from trainer.feature_cache import FeatureCache
cache = FeatureCache(Path(sys.argv[1]), {}, 10**9)
for number in itertools.count():
    digest = hashlib.sha256(repr((number,)).encode()).digest()[:16]
    cache.write([digest], np.full((1, 64, 512), number % 1000, np.float16))
    print(number, flush=True)
"""


def test_what_a_killed_writer_left_is_whole_or_absent(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 50:
        time.sleep(0)
    process.send_signal(signal.SIGKILL)
    said = [int(line) for line in process.stdout.read().splitlines()]
    process.wait()
    last = max(said, default=50)
    cache = FeatureCache(tmp_path / "c", {}, 10**9)
    found = cache.read([digest(number) for number in range(last + 10)])
    assert set(range(last + 1)) <= found.keys(), "everything that was written is there"
    assert all((halves == number % 1000).all() for number, halves in found.items())
    cache.write([b"a" * 16], np.ones((1, 64, 512), np.float16))
    assert len(list((tmp_path / "c").glob("*/*.rows"))) == 1, "the dead writer's shard is gone on with"
    assert cache.read([b"a" * 16]).keys() == {0}


def test_facts_name_what_made_the_features(vision, model_config) -> None:
    facts = tower_facts(vision)
    assert json.loads(json.dumps(facts)) == json.loads(json.dumps(tower_facts(vision)))
    assert facts["layer"] == model_config.vision_layer
    assert facts["preprocess"]["resample"] == "bicubic"
    before = sha256_of(Path(model_config.vision) / "model.safetensors")
    vision.model.encoder.layers[0].mlp.fc1.weight.data[0, 0] += 1
    assert tower_facts(vision)["weights_sha256"] != facts["weights_sha256"]
    assert sha256_of(Path(model_config.vision) / "model.safetensors") == before


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


class Watch(Watcher):
    """Keeps the losses; dies after a step."""

    def __init__(self, dies_after: int = 99) -> None:
        self.dies_after, self.losses = dies_after, list[float]()

    def after_step(self, model: Blip2, report: StepReport) -> None:
        self.losses.append(report.loss)
        if report.step == self.dies_after:
            raise Killed


def test_runs_with_a_cache(model_config, data, tmp_path, passed) -> None:
    """Killed while it fills its cache, a run goes on bit for bit; on a full one it spares the tower, to the same bits.

    The loss differs from an exact run's by the rounding to half precision.
    """
    config = Stage1Config(steps=6, batch_size=8, warmup_steps=2, eval_every=6, eval_items=4, save_every=2)

    def train(out: str, store: FeatureSource, watch: Watch) -> str:
        given = dict(model=model_config, data=data, config=config, seed=3, init=None, recipe_yaml="{}\n", ranks=Ranks())
        run_stage("stage1", out=tmp_path / out, store=store, progress=QUIET, watchers=[watch], **given)
        return sha256_of(tmp_path / out / "model.safetensors")

    exact, whole, again = Watch(), Watch(), Watch()
    train("exact", FeatureStore(), exact)
    expected = train("whole", CachedFeatures(tmp_path / "cache", PLENTY), whole)
    np.testing.assert_allclose(whole.losses, exact.losses, rtol=2e-3)
    assert whole.losses != exact.losses
    with pytest.raises(Killed):
        train("cut", CachedFeatures(tmp_path / "other", PLENTY), Watch(dies_after=5))
    assert train("cut", CachedFeatures(tmp_path / "other", PLENTY), Watch()) == expected
    del passed[:]
    assert train("again", CachedFeatures(tmp_path / "cache", PLENTY), again) == expected
    assert (passed, again.losses) == ([], whole.losses)
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert metrics["features"]["misses"] == 0
    assert metrics["features"]["hits"] in (6 * 8 + 4, 7 * 8 + 4), "the step after the last may have been read ahead"
