"""Filtering the captions of a whole manifest, so that a killed job goes on where it was.

Rows are worked on in pieces of fixed places in the manifest. A finished piece is one line of `.OUT.partial`, flushed to
the disk; a line that was cut off is done again. So no finished image is described twice, and the result is that of an
uninterrupted job also where a caption depends on the images beside it (eager PyTorch). The manifest appears at the end,
whole.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import IO, Any

from runtime.answers import Answerer
from runtime.caption_filter import Counts, Filtered, How, Scored, filter_rows
from runtime.dataset import Row, numbered_lines, parse_row
from runtime.errors import DataError, InputError
from runtime.files import scratch_file, sha256_of
from runtime.retrieval import Retriever

SCORES = "caption_scores"
"""Key beside the captions of a filtered row: score and origin of each."""


@dataclass(frozen=True)
class Job:
    """What is to be done; a job goes on only where all of it is as it was."""

    manifest: Path
    out: Path
    how: How
    piece: int
    """Rows worked on together."""
    made_by: dict[str, str]
    """What tells generator and scorer from others (name → digest)."""

    @property
    def partial(self) -> Path:
        """Where finished pieces wait."""
        return self.out.with_name(f".{self.out.name}.partial")

    def facts(self) -> dict[str, Any]:
        """First line of `partial`."""
        how = asdict(self.how)
        return {"manifest": sha256_of(self.manifest), "piece": self.piece, **how, **self.made_by}


@dataclass
class Summary:
    """What became of a manifest."""

    counts: Counts
    broken: dict[str, str]
    """Images that cannot be read and are not in the result → why."""
    wordless: list[str]
    """Images left out because no caption of theirs has a word."""

    def as_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`; a mean over no captions is null."""
        counts = self.counts
        kept = counts.kept_original + counts.kept_synthetic
        return {
            "images": counts.images,
            "captions": {"original": counts.original, "synthetic": counts.synthetic},
            "kept": {"original": counts.kept_original, "synthetic": counts.kept_synthetic},
            "mean_similarity": {
                "before": counts.before / counts.original if counts.original else None,
                "after": counts.after / kept if kept else None,
            },
            "broken": self.broken,
            "wordless": self.wordless,
        }


def filter_manifest(
    job: Job, generator: Answerer, scorer: Retriever, progress: Callable[[int, int], None] | None = None
) -> Summary:
    """Do what is left of the job and write its manifest; `progress` is told (rows done, rows in all).

    Raises:
        MissingFile, DataError: the manifest cannot be used, or has no captions.
        InputError: OUT is there; a partial result of another job is in its place; or another process is at it.
        OutOfSpace: the disk is full; finished pieces are kept.
    """
    if job.out.exists():
        raise InputError(f"{job.out} is there already; choose another --out, or delete it to filter anew")
    rows = _counted(job.manifest)
    with _opened(job) as file:
        done = _recorded(file, job)
        pieces = _pieces(job)
        for _ in range(done):
            next(pieces)
        for number, piece in enumerate(pieces, start=done):
            if progress is not None:
                progress(min(number * job.piece, rows), rows)
            _append(file, _as_line(filter_rows(generator, scorer, piece, job.how), job.out.parent))
        if progress is not None:
            progress(rows, rows)
        summary = _written(file, job)
        job.partial.unlink()
    return summary


def _counted(manifest: Path) -> int:
    """Rows of the manifest; a wrong one stops the job here and not after hours."""
    rows = captioned = 0
    for where, line in numbered_lines(manifest):
        rows, captioned = rows + 1, captioned + bool(parse_row(line, where, manifest.parent).captions)
    if not captioned:
        raise DataError(f"{manifest}: expected rows with captions to filter, found none among {rows}")
    return rows


def _pieces(job: Job) -> Iterator[list[Row]]:
    rows = (parse_row(line, where, job.manifest.parent) for where, line in numbered_lines(job.manifest))
    while piece := list(islice(rows, job.piece)):
        yield piece


@contextmanager
def _opened(job: Job) -> Iterator[IO[bytes]]:
    """The partial result, ours alone as long as the block lasts."""
    job.partial.parent.mkdir(parents=True, exist_ok=True)
    with job.partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{job.out}: another process is filtering captions into it; wait for it") from error
        yield file


def _recorded(file: IO[bytes], job: Job) -> int:
    """How many pieces are finished; a new file is given its first line.

    Raises:
        InputError: they are of another job.
    """
    file.seek(0)
    whole = list(takewhile(lambda length: length, (len(line) if line.endswith(b"\n") else 0 for line in file)))
    file.truncate(sum(whole))
    if not whole:
        _append(file, job.facts())
        return 0
    file.seek(0)
    found, expected = json.loads(file.readline()), job.facts()
    if changed := [name for name in {**found, **expected} if found.get(name) != expected.get(name)]:
        raise InputError(
            f"{job.partial}: expected what this command began, found another {', '.join(changed)} (there "
            f"{found.get(changed[0])!r}, now {expected.get(changed[0])!r}); go on with the same, or delete it to begin"
            f" anew"
        )
    return len(whole) - 1


def _append(file: IO[bytes], record: dict[str, Any]) -> None:
    """One line, on the disk when this returns."""
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _as_line(done: Filtered, folder: Path) -> dict[str, Any]:
    return {
        "rows": [_record(row, kept, folder) for row, kept in done.rows],
        "broken": done.broken,
        "wordless": done.wordless,
        "counts": asdict(done.counts),
    }


def _record(row: Row, kept: list[Scored], folder: Path) -> dict[str, Any]:
    """A row as the manifest says it, its image relative to the new one; one without captions stays as it was."""
    record = {"image": os.path.relpath(row.image, folder.absolute()), "image_id": row.image_id}
    captions: dict[str, Any] = {}
    if kept:
        captions["captions"] = [caption.text for caption in kept]
        captions[SCORES] = [{"score": round(caption.score, 6), "origin": caption.origin} for caption in kept]
    asked = {} if row.question is None else {"question": row.question, "answers": list(row.answers)}
    return record | row.extra | captions | asked


def _written(file: IO[bytes], job: Job) -> Summary:
    """The manifest at its place, and what the pieces add up to."""
    summary = Summary(Counts(), {}, [])
    file.seek(0)
    file.readline()
    with scratch_file(job.out) as work:
        with work.open("w", encoding="utf-8") as out:
            for line in file:
                piece = json.loads(line)
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in piece["rows"])
                summary.broken |= piece["broken"]
                summary.wordless += piece["wordless"]
                counts = asdict(summary.counts)
                summary.counts = Counts(**{name: counts[name] + piece["counts"][name] for name in counts})
            out.flush()
            os.fsync(out.fileno())
        work.replace(job.out)
    return summary
