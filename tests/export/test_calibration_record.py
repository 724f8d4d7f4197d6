"""The record of a calibration: true, complete, and refused when it no longer fits."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.calibrate import calibrate, source_of
from export.calibration_record import RECORD, Calibration, read_calibration, write_calibration
from export.config import ExportConfig
from export.feeds import StoredFeeds
from qforge import verbs_bundle
from runtime.bundle import Bundle, read_bundle
from runtime.errors import DataError, InputError, MissingFile
from tests.export.conftest import CONFIG, QUIET, Export

SMALL = ExportConfig(calibration_images=4, seed=3, range_method="percentile")


@pytest.fixture(scope="module")
def home(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of one's own, whose images may be changed."""
    return Path(shutil.copytree(world, tmp_path_factory.mktemp("home") / "world"))


@pytest.fixture(scope="module")
def record(checkpoint: Path, home: Path) -> Path:
    out = home.parent / "calibration.json"
    options = {"calibration_images": 4, "seed": 3, "range_method": "percentile", "heads": None}
    outcome = verbs_bundle.calibrate(checkpoint, [home / "vqa_train.jsonl"], out, options, [])
    assert (outcome.data["count"], outcome.data["method"]) == (4, "percentile")
    return out


def edited(record: Path, to: Path, **fields: object) -> Path:
    to.write_text(json.dumps(json.loads(record.read_text()) | fields))
    return to


def test_it_says_what_was_measured_and_on_what(record: Path, bundle_fp32: Bundle, home: Path) -> None:
    found = read_calibration(record)
    assert (found.count, found.seed, found.method) == (4, 3, "percentile")
    assert found.checkpoint == bundle_fp32.manifest.made_by["checkpoint"]
    assert found.data == ("world/vqa_train.jsonl",)
    assert all(image.image.startswith("world/images/train-") for image in found.images)
    assert all(image.asked[0] is None and image.asked[1] for image in found.images), "a caption and a question each"
    assert set(found.ranges) == {"vision", "qformer"}
    assert all(low <= high for of_graph in found.ranges.values() for low, high in of_graph.values())
    assert str(home) not in record.read_text(), "it may move together with its data"


def test_a_bundle_states_the_ranges_it_computes_with(bundle_int8: Bundle, world: Path) -> None:
    found = read_calibration(bundle_int8.path / RECORD)
    assert found.measured_on == "written graphs"
    assert (found.count, found.seed) == (CONFIG.calibration_images, CONFIG.seed)
    low, high = found.ranges["vision"]["pixels"]
    assert low == -high
    source = source_of([bundle_int8.path / RECORD])
    assert source.manifests == ((world / "captions_train.jsonl").resolve(), (world / "vqa_train.jsonl").resolve())


def test_an_export_takes_the_very_same_images_again(
    record: Path, checkpoint: Path, bundle_fp32: Bundle, tmp_path: Path
) -> None:
    export = Export(checkpoint, [record], bundle_fp32.path)
    again = read_bundle(export(tmp_path / "again", SMALL.model_copy(update=CHANGED), precision="int8"))
    first, second = read_calibration(record), read_calibration(again.path / RECORD)
    assert second.data_sha256 == first.data_sha256
    assert (second.count, second.seed, second.method) == (4, 3, "percentile")
    parity = json.loads((again.path / "parity.json").read_text())
    assert parity["greedy_answers"]["images"] == 6


CHANGED = {"calibration_images": 9, "seed": 8, "range_method": "minmax", "verification_images": 6, "max_batch": 5}
"""Settings that a record overrules, and those it has no say in."""


def test_ranges_of_another_checkpoint_are_refused(record: Path, export: Export, tmp_path: Path) -> None:
    other = edited(record, record.with_name("other.json"), checkpoint="0" * 64)
    with pytest.raises(InputError, match="expected ranges of this checkpoint"):
        export(tmp_path / "out", precision="int8", calibration=[other])


def test_a_record_is_of_no_use_in_fp32(record: Path, export: Export, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a calibration is for int8 and fp8, found fp32"):
        export(tmp_path / "out", calibration=[record])


def test_changed_and_missing_images_are_named(record: Path, export: Export, home: Path, tmp_path: Path) -> None:
    images = [home.parent / image.image for image in read_calibration(record).images]
    before = images[1].read_bytes()
    images[0].rename(home / "away.png")
    images[1].write_bytes(before + b"more")
    try:
        with pytest.raises(
            DataError, match=rf"2 of its 4 images .*{images[0].name} \(missing\).*{images[1].name} \(ch"
        ):
            export(tmp_path / "out", precision="int8", calibration=[record])
    finally:
        (home / "away.png").rename(images[0])
        images[1].write_bytes(before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "best"}, "method: Input should be"),
        ({"count": 3}, "changed by hand"),
        ({"images": []}, "changed by hand"),
        ({"data_sha256": "0" * 64}, "changed by hand"),
    ],
)
def test_a_record_edited_by_hand_is_refused(
    record: Path, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_calibration(edited(record, tmp_path / "edited.json", **fields))


@pytest.mark.parametrize("option", ["calibration_images", "range_method"])
def test_what_the_record_states_cannot_be_asked_for(
    option: str, record: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = {"calibration_images": None, "range_method": None} | {option: "minmax" if "method" in option else 3}
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')}: expected none beside a calibration record"):
        verbs_bundle.export(checkpoint, tmp_path / "out", "int8", [record], None, options, [])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("gate.items", 4, "--gate-items: expected --max-drop beside it"),
        ("gate.plot", True, "--gate-plot: expected --max-drop beside it"),
        ("gate.data", Path("val: set.jsonl"), "data and task are of use with max_drop alone"),
        ("gate.max_drop", -1.0, "greater than or equal to 0"),
    ],
)
def test_options_of_the_gate_need_a_limit(
    option: str, value: object, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    options = {"calibration_images": None, "range_method": None, option: value}
    with pytest.raises(InputError, match=message):
        verbs_bundle.export(checkpoint, tmp_path / "out", "int8", [], None, options, [])


def test_one_record_at_most(record: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one calibration record, found 2"):
        source_of([record, edited(record, tmp_path / "twin.json")])
    with pytest.raises(MissingFile, match=r"expected a manifest \(JSON Lines\) or a calibration.json"):
        source_of([tmp_path / "nothing.json"])


def test_too_few_images_leave_the_old_record(record: Path, checkpoint: Path, world: Path, tmp_path: Path) -> None:
    old = Path(shutil.copy(record, tmp_path / "old.json"))
    with pytest.raises(DataError, match=r"expected 99 images .* found 24"):
        many = SMALL.model_copy(update={"calibration_images": 99})
        calibrate(checkpoint, old, many, data=[world / "vqa_train.jsonl"], progress=QUIET)
    assert read_calibration(old) == read_calibration(record)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_what_is_written_is_read(record: Path, tmp_path: Path) -> None:
    found: Calibration = read_calibration(record)
    write_calibration(tmp_path / "copy.json", found)
    assert (tmp_path / "copy.json").read_bytes() == record.read_bytes()


def test_stored_feeds_hold_one_run_in_memory(tmp_path: Path) -> None:
    feeds, rng = StoredFeeds(tmp_path / "feeds"), np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(40):
        feeds.append({"x": rng.normal(size=(256, 256))})  # half a MiB each
    total = sum(float(feed["x"].sum()) for feed in feeds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert len(feeds) == 40
    last: NDArray[np.float64] = feeds[-1]["x"]
    np.testing.assert_array_equal(feeds[30:][-1]["x"], last)
    assert np.isfinite(total)
    with pytest.raises(IndexError):
        feeds[40]
