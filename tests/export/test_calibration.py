"""Only real images, drawn by seed; too few is an error, never a smaller calibration."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from export.calibration import Drawn, calibration_feeds, draw
from export.graphs import Graph
from export.retrieval_verify import draw_pairs
from runtime.errors import DataError
from runtime.preprocess import preprocess
from runtime.progress import Progress
from tests.alive import Alive
from trainer.blip2 import Blip2


class Notes(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def drawn(model: Blip2, manifests: list[Path], seed: int = 0, **counts: int) -> Drawn:
    counts = {"calibration_images": 6, "verification_images": 4} | counts
    return draw(model, manifests, seed=seed, progress=Progress(quiet=True), **counts)


def test_the_seed_decides_and_no_image_serves_twice(model: Blip2, manifests: list[Path]) -> None:
    first = drawn(model, manifests)
    assert first == drawn(model, manifests)
    assert first != drawn(model, manifests, seed=1)
    calibrated, verified = ({request.image for request in part} for part in (first.calibration, first.verification))
    assert (len(calibrated), len(verified)) == (6, 4)
    assert not calibrated & verified


def test_every_image_is_captioned_and_asked(model: Blip2, manifests: list[Path], world: Path) -> None:
    for part in (drawn(model, manifests), drawn(model, [world / "vqa_train.jsonl"])):
        asked = [request.question is not None for request in part.calibration]
        assert asked == [False, True] * 6


def test_rows_are_looked_at_one_by_one(model: Blip2, manifests: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Alive(monkeypatch)
    found = drawn(model, manifests)
    draw_pairs(manifests, found.calibration, seed=0)
    assert alive.given == 2 * sum(len(path.read_text().splitlines()) for path in manifests)
    assert alive.most <= 2, "the one that is looked at, and the one that follows it"


def test_too_few_images_is_an_error(model: Blip2, manifests: list[Path]) -> None:
    with pytest.raises(DataError, match=r"expected 30 images \(26 to calibrate, 4 to verify\), found 24; give more"):
        drawn(model, manifests, calibration_images=26)


def test_no_manifest_is_an_error(model: Blip2) -> None:
    with pytest.raises(DataError, match="expected a manifest of real images"):
        drawn(model, [])


def test_captions_alone_are_not_enough_for_a_model_that_reads_questions(model: Blip2, world: Path) -> None:
    with pytest.raises(DataError, match="the model reads questions"):
        drawn(model, [world / "captions_train.jsonl"])


def test_a_question_too_long_for_the_qformer_is_not_asked(model: Blip2, world: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "long.jsonl"
    rows = [
        f'{{"image": "{image}", "question": "{"what is red and " * 20}", "answers": ["x"]}}\n'
        for image in sorted((world / "images").glob("train-*.png"))
    ]
    manifest.write_text("".join(rows))
    with pytest.raises(DataError, match="found none about the images drawn"):
        drawn(model, [manifest])


def test_unreadable_images_are_passed_over_and_told(model: Blip2, world: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(world, tmp_path / "world")
    (copy / "images" / "train-00003.png").write_bytes(b"no picture")
    manifests, notes = [copy / "vqa_train.jsonl"], Notes()
    part = draw(model, manifests, calibration_images=19, verification_images=4, seed=0, progress=notes)
    assert "train-00003.png" not in {Path(str(r.image)).name for r in (*part.calibration, *part.verification)}
    assert ["1 images cannot be read" in line and "train-00003.png" in line for line in notes.lines] == [True]
    with pytest.raises(DataError, match=r"found 23 and 1 that cannot be read: .*train-00003\.png"):
        drawn(model, manifests, calibration_images=20)


def test_feeds_are_what_serving_gives(
    model: Blip2, graphs: dict[str, Graph], manifests: list[Path], tmp_path: Path
) -> None:
    part = drawn(model, manifests)
    feeds = calibration_feeds(model, graphs, part.calibration, tmp_path)
    assert (len(feeds["vision"]), len(feeds["qformer"])) == (6, 12)
    first = part.calibration[0]
    np.testing.assert_array_equal(feeds["vision"][0]["pixels"][0], preprocess(first.image, model.preprocess))
    masks = [feed["question_mask"] for feed in feeds["qformer"]]
    assert [int(mask.any()) for mask in masks] == [0, 1] * 6
    assert masks[0].shape == (1, 1)
    question = str(part.calibration[1].question)
    assert feeds["qformer"][1]["question_ids"].tolist() == [model.text_tokenizer(question).input_ids]
    embeds = graphs["vision"].run_eager(feeds["vision"][1])["image_embeds"]
    np.testing.assert_array_equal(feeds["qformer"][3]["image_embeds"], embeds)
