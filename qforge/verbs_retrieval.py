"""The verbs that search: index, search, and the retrieval task of evaluate; torch only to score a checkpoint."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qforge.console import Outcome, must_be_ours
from qforge.contact_sheet import Result, draw_results
from qforge.evaluation import open_retriever
from qforge.sources import MANIFEST_SUFFIX, images_of
from runtime import load_retrieval
from runtime.backends import Device
from runtime.dataset import read_manifest
from runtime.decoding import GREEDY, Decoding
from runtime.errors import DataError, InputError, MissingFile
from runtime.index import INDEX, Dtype, Index, write_image_index, write_text_index
from runtime.progress import Progress
from runtime.recall import AT, evaluate_retrieval
from runtime.retrieval import Retrieval
from runtime.search import Hit, check_counts
from trainer.sources.convert import read_rows

LINES_SUFFIX = ".txt"
NAMED = 10
"""Unreadable images told by name; all are in index.json."""


def index(
    bundle: Path,
    sources: Sequence[Path],
    out: Path,
    texts: bool,
    small: bool,
    dtype: Dtype,
    device: Device,
) -> Outcome:
    """An index at `out`."""
    must_be_ours(out, INDEX)
    if texts and small:
        raise InputError("--small: an index of texts keeps no embeddings of images; leave the option out")
    write = (
        partial(write_text_index, texts=list(_texts_of(sources)))
        if texts
        else partial(write_image_index, images=list(images_of(sources)), keep_embeds=not small)
    )
    with _open(bundle, device) as retrieval:
        facts = write(retrieval, out=out, dtype=dtype, progress=Progress())
    size = sum(file.stat().st_size for file in out.iterdir())
    lines = [f"Index: {out} ({facts.count} {facts.kind}, {size / 2**20:.1f} MiB)"]
    if facts.broken:
        lines.append(f"{len(facts.broken)} images cannot be read and are not in it:")
        lines += list(facts.broken.values())[:NAMED]
        if len(facts.broken) > NAMED:
            lines.append(f"… and {len(facts.broken) - NAMED} more; {out / INDEX} names all")
    data = {"index": str(out), "kind": facts.kind, "count": facts.count, "bytes": size, "broken": facts.broken}
    return Outcome(data, "\n".join(lines))


def search(
    folder: Path,
    texts: Sequence[str],
    images: Sequence[Path],
    top: int,
    candidates: int,
    picture: Path | None,
    bundle: Path | None,
    device: Device,
) -> Outcome:
    """A block of lines per query, best first."""
    if bool(texts) == bool(images):
        raise InputError('search: expected either texts or --image, such as: qforge search INDEX "a red circle"')
    check_counts(top, candidates)
    opened = Index(folder)
    with _open(_bundle_of(opened, bundle), device) as retrieval:
        if texts:
            hits = opened.find_images(retrieval, texts, top=top, candidates=candidates)
        else:
            hits = opened.find_texts(retrieval, images, top=top, candidates=candidates)
    queries = list(texts) or [str(image) for image in images]
    results = [Result(query, of_query) for query, of_query in zip(queries, hits, strict=True)]
    asked, answered = ("text", "image") if texts else ("image", "text")
    if picture is not None:
        draw_results(results, picture, queries_are_images=bool(images))
    data = [{asked: result.query, "hits": [_as_json(answered, *hit) for hit in result.hits]} for result in results]
    return Outcome(
        {"results": data, "candidates": candidates, "picture": None if picture is None else str(picture)},
        "\n".join(line for result in results for line in _lines(result, len(results) > 1)),
    )


def require_plain(image_size: int | None, cache_dir: Path | None, decoding: Decoding) -> None:
    """InputError for an option of `qforge evaluate` that retrieval has no use for."""
    if image_size is not None:
        raise InputError("--image-size: retrieval reads images at the trained size; leave it out")
    if cache_dir is not None:
        raise InputError("--cache-dir: retrieval looks at every image once and keeps no cache; leave it out")
    if decoding != GREEDY:
        raise InputError("retrieval says no texts; leave the options of decoding (beams, penalties …) out")


def evaluate(path: Path, manifest: Path, candidates: int, device: Device) -> Outcome:
    """Recall on one data set."""
    rows = read_rows(manifest)
    with open_retriever(path, device) as retriever:
        found = evaluate_retrieval(retriever, rows, candidates=candidates, progress=Progress())
    lines = [f"{found.images} images, {found.texts} captions, {candidates or 'no'} candidates re-ranked"]
    for direction in ("text_to_image", "image_to_text"):
        for prefix, name in (("itc", "contrast alone"), ("itm", "re-ranked")):
            values = [found.metrics.get(f"{prefix}_{direction}_r{at}") for at in AT]
            shown = [f"R@{at} {100 * value:.2f} %" for at, value in zip(AT, values, strict=True) if value is not None]
            if shown:
                lines.append(f"{direction.replace('_', ' ')}, {name}: {'  '.join(shown)}")
    return Outcome(found.as_json(), "\n".join(lines))


def _open(bundle: Path, device: Device) -> Retrieval:
    return load_retrieval(bundle, device.backend, device.threads, device.provider)


def _texts_of(sources: Sequence[Path]) -> Iterable[str]:
    """Captions of manifests, lines of text files."""
    for source in sources:
        if source.suffix == MANIFEST_SUFFIX:
            yield from (caption for row in read_manifest(source) for caption in row.captions)
        elif source.suffix == LINES_SUFFIX and source.is_file():
            try:
                yield from (line for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip())
            except UnicodeDecodeError as error:
                raise DataError(f"{source}: expected UTF-8 text, found other bytes; save it as UTF-8") from error
        else:
            raise InputError(
                f"{source}: expected a manifest ({MANIFEST_SUFFIX}) or a text file ({LINES_SUFFIX}, one text a line) "
                f"with --texts"
            )


def _bundle_of(index: Index, given: Path | None) -> Path:
    path = given or index.bundle_path()
    if not path.is_dir():
        raise MissingFile(
            f"{index.path}: its bundle was at {path}, found nothing there; say where it is now: --bundle DIR"
        )
    return path


def _as_json(kind: str, found: str, hit: Hit) -> dict[str, Any]:
    return {
        kind: found,
        "score": hit.score,
        "itc": hit.itc,
        "match_logit": hit.match_logit,
        "match_probability": hit.match_probability,
    }


def _lines(result: Result, titled: bool) -> list[str]:
    lines = [f"{result.query}:"] if titled else []
    for found, hit in result.hits:
        matched = "" if hit.match_probability is None else f"  match {100 * hit.match_probability:5.1f} %"
        lines.append(f"{hit.score:8.3f}  itc {hit.itc:6.3f}{matched}  {found}")
    return lines
