"""Calibration alone: draw images, measure ranges on the traced graphs, leave a record that an export takes up.

qforge calibrate runs/demo/checkpoint --data vqa_train.jsonl --images 128 --out calibration.json
"""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export import facts
from export.calibration import Drawn, calibration_feeds, draw
from export.calibration_record import (
    Calibration,
    MeasuredOn,
    is_calibration,
    manifests_of,
    read_calibration,
    recorded,
    same_requests,
    write_calibration,
)
from export.config import ExportConfig
from export.feeds import StoredFeeds
from export.ranges import Ranges, observe
from export.retrieval_graphs import GraphSet, chosen_heads, graph_set
from export.retrieval_verify import Pair, draw_pairs, retrieval_feeds
from export.trace import trace
from runtime.answers import Request
from runtime.errors import InputError
from runtime.precision import CALIBRATED, Precision
from runtime.progress import Progress
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint, read_config


@dataclass(frozen=True)
class Source:
    """Where calibration data comes from."""

    manifests: tuple[Path, ...]
    """Manifests of real images, to draw from."""
    record: Path | None
    """An earlier calibration, whose images are taken again."""
    earlier: Calibration | None
    """What the record says."""

    def overrule(self, config: ExportConfig, precision: Precision) -> ExportConfig:
        """The settings with the record's method; InputError when this precision has no ranges."""
        if self.earlier is None:
            return config
        if precision not in CALIBRATED:
            raise InputError(
                f"{self.record}: a calibration is for {' and '.join(CALIBRATED)}, found {precision}; "
                f"give a manifest of images"
            )
        return config.model_copy(update={"range_method": self.earlier.method})

    def again(self, checkpoint: str, searches: bool) -> tuple[list[Request], dict[Path, list[str]]]:
        """Requests and texts of the record, none without one.

        Raises:
            InputError, DataError: as `same_requests`; or a bundle that searches finds no texts in the record.
        """
        if self.record is None or self.earlier is None:
            return [], {}
        requests, texts = same_requests(self.record, self.earlier, checkpoint)
        if searches and not any(texts.values()):
            raise InputError(
                f"{self.record}: expected texts that the images are searched with, found none; calibrate again: "
                f"qforge calibrate --heads both"
            )
        return requests, texts

    def record_of(
        self,
        drawn: Drawn,
        pairs: Sequence[Pair],
        made_by: Mapping[str, str],
        config: ExportConfig,
        ranges: dict[str, Ranges],
        folder: Path,
        measured_on: MeasuredOn = "written graphs",
    ) -> Calibration:
        """What is to lie in `folder` of a calibration on these requests and pairs."""
        texts: dict[Path, list[str]] = {}
        for pair in pairs:
            texts.setdefault(pair.image, []).append(pair.text)
        return recorded(
            drawn.calibration,
            texts,
            manifests=self.manifests,
            folder=folder,
            checkpoint=made_by["checkpoint"],
            qforge=made_by["qforge"],
            seed=self.earlier.seed if self.earlier else config.seed,
            method=config.range_method,
            measured_on=measured_on,
            ranges=ranges,
        )


def source_of(files: Sequence[Path]) -> Source:
    """Tell manifests of images from a `calibration.json`; a record alone brings its own manifests.

    Raises:
        InputError: more than one record. DataError: a damaged record. MissingFile: no such file.
    """
    records = [file for file in files if is_calibration(file)]
    if len(records) > 1:
        raise InputError(f"expected one calibration record, found {len(records)}: {', '.join(map(str, records))}")
    manifests = tuple(file for file in files if file not in records)
    if not records:
        return Source(manifests, None, None)
    earlier = read_calibration(records[0])
    return Source(manifests or tuple(manifests_of(records[0], earlier)), records[0], earlier)


def calibrate(
    checkpoint: Path, out: Path, config: ExportConfig, *, data: Sequence[Path], progress: Progress
) -> Calibration:
    """Write the record `out`; an older one is replaced when all is measured.

    Args:
        checkpoint: Folder that `qforge train` made.
        out: File to write.
        config: Number of images, seed, method and heads.
        data: Manifests of real images, read together.
        progress: Where bars are shown.

    Raises:
        DataError: too few images, no questions, or no captions. CheckFailed: NaN on a real image.
        CheckpointError, InputError, OutOfSpace: as their names say.
    """
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write or nothing, found a folder; choose another name")
    model = load_checkpoint(checkpoint)
    graphs = graph_set(model, chosen_heads(model, config.heads, read_config(checkpoint).stage))
    made_by = facts.made_by(checkpoint)
    drawn = draw(
        model,
        data,
        calibration_images=config.calibration_images,
        verification_images=0,
        seed=config.seed,
        progress=progress,
        answers=bool(graphs.answering),
    )
    pairs = draw_pairs(data, drawn.calibration, config.seed) if graphs.searching else []
    with tempfile.TemporaryDirectory(prefix="qforge-") as name:
        work = Path(name)
        feeds = feeds_of(model, graphs, graphs.all, drawn.calibration, pairs, work / "feeds")
        ranges = dict[str, Ranges]()
        with progress.bar("observing ranges", len(feeds)) as bar:
            for name, of_graph in feeds.items():
                ranges[name] = observe(trace(graphs.all[name], work), of_graph, config.range_method)
                bar.advance()
        source = Source(tuple(data), None, None)
        calibration = source.record_of(drawn, pairs, made_by, config, ranges, out.parent, "traced graphs")
    write_calibration(out, calibration)
    return calibration


def feeds_of(
    model: Blip2,
    graphs: GraphSet,
    wanted: Collection[str],
    requests: Sequence[Request],
    pairs: Sequence[Pair],
    folder: Path,
) -> dict[str, StoredFeeds]:
    """What the graphs of each way meet (vision with the Q-Former, vision with the retrieval heads), kept in `folder`.

    A way none of whose graphs is wanted is left out.
    """
    feeds = dict[str, StoredFeeds]()
    if set(wanted) & graphs.searching.keys():
        feeds |= retrieval_feeds(model, graphs.searching, pairs, folder / "searching")
    if set(wanted) & {"vision", "qformer"} and graphs.answering:
        feeds |= calibration_feeds(model, graphs.answering, requests, folder / "answering")
    return feeds


def pairs_of(texts: Mapping[Path, Sequence[str]]) -> list[Pair]:
    """The pairs of an earlier calibration."""
    return [Pair(image, text) for image, of in texts.items() for text in of]
