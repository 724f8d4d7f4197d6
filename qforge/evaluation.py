"""One door to everything that answers: a bundle (engines, no torch) or a checkpoint (eager PyTorch)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runtime.answers import Answerer
from runtime.backends import Device
from runtime.dataset import Row
from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError, MissingFile, require
from runtime.evaluate import Evaluation, evaluate
from runtime.progress import Bar, Progress

if TYPE_CHECKING:
    from runtime.retrieval import Retriever
    from trainer.blip2 import Blip2

Kind = Literal["bundle", "checkpoint"]


def kind_of(path: Path) -> Kind:
    """What lies at `path`; raises MissingFile or InputError when it is neither."""
    if not path.exists():
        raise MissingFile(f"{path}: expected a bundle or a checkpoint folder, found nothing there.")
    if (path / "manifest.json").is_file():
        return "bundle"
    if (path / "model.safetensors").is_file():
        return "checkpoint"
    raise InputError(
        f"{path}: expected a bundle (with manifest.json) or a checkpoint (with model.safetensors), found neither."
    )


@contextmanager
def open_answerer(path: Path, device: Device) -> Iterator[Answerer]:
    """A pipeline over the bundle, or eager PyTorch over the checkpoint (of which `device` gives the threads alone)."""
    if kind_of(path) == "bundle":
        from runtime import load

        with load(path, device.backend, device.threads, provider=device.provider) as pipeline:
            yield pipeline
        return
    model = _eager(path, device, why="Answering with a checkpoint")
    from trainer.generate import EagerPipeline

    yield EagerPipeline(model)


def evaluate_rows(
    answerer: Answerer,
    rows: Sequence[Row],
    task: Literal["caption", "vqa"],
    batch_size: int,
    title: str,
    image_size: int | None = None,
    decoding: Decoding = GREEDY,
) -> Evaluation:
    """`runtime.evaluate` with a progress bar on stderr and the scorers that fit the rows."""
    from trainer.demo_world import scorers_for

    scorers = scorers_for(rows) if task == "caption" else {}
    with reporting(title) as progress:
        return evaluate(
            answerer,
            rows,
            task=task,
            batch_size=batch_size,
            image_size=image_size,
            decoding=decoding,
            scorers=scorers,
            progress=progress,
        )


@contextmanager
def open_retriever(path: Path, device: Device) -> Iterator["Retriever"]:
    """A bundle that searches, or eager PyTorch over the checkpoint (of which `device` gives the threads alone)."""
    if kind_of(path) == "bundle":
        from runtime import load_retrieval

        with load_retrieval(path, device.backend, device.threads, device.provider) as retrieval:
            yield retrieval
        return
    model = _eager(path, device, why="Scoring with a checkpoint")
    from trainer.retrieval import EagerRetrieval

    yield EagerRetrieval(model)


@contextmanager
def open_filter(generator: Path, scorer: Path, device: Device) -> Iterator[tuple[Answerer, "Retriever"]]:
    """Who describes images, and who scores descriptions; one checkpoint that does both is loaded once."""
    with ExitStack() as opened:
        if kind_of(generator) == "bundle":
            describes = opened.enter_context(open_answerer(generator, device))
            yield describes, opened.enter_context(open_retriever(scorer, device))
            return
        model = _eager(generator, device, why="Describing with a checkpoint")
        from trainer.generate import EagerPipeline
        from trainer.retrieval import EagerRetrieval

        same = scorer.resolve() == generator.resolve()
        scores = EagerRetrieval(model) if same else opened.enter_context(open_retriever(scorer, device))
        yield EagerPipeline(model, draws=True), scores


def _eager(path: Path, device: Device, why: str) -> "Blip2":
    """The PyTorch model of a checkpoint; `why` begins the sentence that is said where torch is not installed."""
    if device.provider != "cpu":
        raise InputError(f"{path}: --provider {device.provider} is for bundles; a checkpoint runs as eager PyTorch")
    torch = require("torch", extra="train", why=why)
    from trainer.checkpoint import load_checkpoint

    if device.threads is not None:
        torch.set_num_threads(device.threads)
    return load_checkpoint(path)


@contextmanager
def reporting(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for work that reports (items done, items in all)."""
    with ExitStack() as stack:
        bar: Bar | None = None
        shown = 0

        def progress(done: int, total: int) -> None:
            nonlocal bar, shown
            if bar is None:
                bar = stack.enter_context(Progress().bar(title, total))
            for _ in range(done - shown):
                bar.advance()
            shown = done

        yield progress
