"""A bundle as one object: what it can answer, search and embed. This is what `qforge.load` gives.

    with qforge.load("runs/demo/bundle-int8") as model:
        print(model.caption("photo.jpg")[0].text)
        print(model.vqa("photo.jpg", "what colour is the circle?").text)

Images are paths, bytes of an image file, PIL images, or uint8 arrays (height, width[, 1 | 3 | 4]).

What the bundle answers with is opened by `load`, so a missing package or a damaged file is known there. What it
searches with, where it does both, is opened by the first call that needs it: that spares start-up time and memory, and
its files are hashed again then. Vision and the query cache are shared by both.

Shape letters: B images, Q queries, F contrastive width, D language width
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from runtime.answers import Answer, Request
from runtime.backends import Device
from runtime.batching.pipeline import open_pipeline
from runtime.bundle import Bundle, read_bundle
from runtime.chat import Chat, ChatAnswer, Turns, split_turns
from runtime.closing import Closing
from runtime.decoding import GREEDY, Decoding
from runtime.disk_cache import DiskCache
from runtime.errors import InputError
from runtime.index import Index
from runtime.pipeline import Pipeline
from runtime.preprocess import ImageSource, sources_of
from runtime.provider import Provider
from runtime.query_cache import Cache
from runtime.retrieval import GRAPHS, Retrieval
from runtime.search import CANDIDATES, Hit
from runtime.shared_graphs import Lender
from runtime.streaming import Piece
from runtime.tiered_cache import open_cache
from runtime.tuned import device_of


class Model(Closing):
    """A bundle that is open. Safe to share between threads.

    Engines run for several threads at once, the cache has its own lock, tokenizers are never changed once they are
    read, and what opens late opens under a lock. Only `close` wants that no call is on its way.

    Every method raises ImageError for an image that cannot be read, InputError for an argument that cannot be used or a
    bundle that has no such heads, BundleError when somebody writes into the bundle, and MemoryError when there is no
    memory for the request; the model stays usable.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device,
        cache_bytes: int,
        disk: DiskCache | None = None,
        batch_wait_ms: float | None = None,
    ) -> None:
        """Open what the bundle is for; arguments and errors are those of `load`."""
        self.bundle = bundle
        self._device = device
        self._lock = threading.Lock()
        self._closed = False
        self._pipeline: Pipeline | None = None
        self._retrieval: Retrieval | None = None
        lender = Lender(device)
        if self.answers:
            self._pipeline = open_pipeline(
                bundle, lender, cache_bytes=cache_bytes, disk=disk, batch_wait_ms=batch_wait_ms
            )
            self.cache: Cache = self._pipeline.cache
            """Counters by tier: `cache.statistics()`."""
        else:
            self.cache = open_cache(cache_bytes, disk)
            self._retrieval = Retrieval(bundle, device=device, cache=self.cache)
        self._borrower = lender.borrower()

    @property
    def answers(self) -> bool:
        """Whether the bundle captions, answers and chats."""
        return self.bundle.manifest.model.style != "none"

    @property
    def searches(self) -> bool:
        """Whether the bundle has the heads that match images with texts."""
        return all(name in self.bundle.manifest.graphs for name in GRAPHS)

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer requests of any kinds, batched; an answer per request, in order. See `Pipeline.answer`."""
        return self._answering("answer").answer(requests, max_new_tokens=max_new_tokens, decoding=decoding)

    def caption(
        self,
        images: ImageSource | Sequence[ImageSource],
        prompt: str | None = None,
        *,
        max_new_tokens: int | None = None,
        decoding: Decoding = GREEDY,
    ) -> list[Answer]:
        """Caption one image or several; a list either way.

        `prompt` replaces the bundle's, `max_new_tokens` its longest text (tokens).
        """
        requests = [Request(image, prompt=prompt) for image in sources_of(images)]
        return self._answering("caption").answer(requests, max_new_tokens=max_new_tokens, decoding=decoding)

    def vqa(
        self,
        image: ImageSource,
        question: str,
        prompt: str | None = None,
        *,
        max_new_tokens: int | None = None,
        decoding: Decoding = GREEDY,
    ) -> Answer:
        """Answer a question about an image; `prompt` replaces the bundle's and has `{}` where the question goes."""
        requests = [Request(image, question, prompt)]
        return self._answering("vqa").answer(requests, max_new_tokens=max_new_tokens, decoding=decoding)[0]

    def stream(
        self, request: Request, *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> Iterator[Piece]:
        """One answer while it is said: a piece per token, the last with the whole answer. See `Pipeline.stream`."""
        return self._answering("stream").stream(request, max_new_tokens=max_new_tokens, decoding=decoding)

    @overload
    def chat(
        self,
        image: ImageSource,
        turns: None = None,
        *,
        prompt: str | None = None,
        image_size: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding = GREEDY,
    ) -> Chat: ...

    @overload
    def chat(
        self,
        image: ImageSource,
        turns: Turns,
        *,
        prompt: str | None = None,
        image_size: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding = GREEDY,
    ) -> ChatAnswer: ...

    def chat(
        self,
        image: ImageSource,
        turns: Turns | None = None,
        *,
        prompt: str | None = None,
        image_size: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding = GREEDY,
    ) -> Chat | ChatAnswer:
        """A conversation about one image.

            chat = model.chat("photo.jpg")
            chat.ask("what is on the table?")
            chat.ask("which colour is it?").text
            model.chat("photo.jpg", [("what is on the table?", "a cup"), "which colour is it?"]).text

        Without `turns` a `Chat`, which keeps the history; with them the answer to the last one, which has none yet.
        Turns that the bundle has no positions for are left out, the oldest first, and counted: `dropped_turns`.
        """
        pipeline = self._answering("chat")
        history, question = ([], None) if turns is None else split_turns(turns)
        chat = Chat(
            pipeline,
            image,
            prompt=prompt,
            image_size=image_size,
            max_new_tokens=max_new_tokens,
            decoding=decoding,
            turns=history,
        )
        return chat if question is None else chat.ask(question)

    def embed(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        kind: Literal["features", "prefix"] | None = None,
        question: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Vectors of one image or several, float32, through the query cache.

        Args:
            images: One, or a sequence.
            kind: "features": [B, Q, F], each of Euclidean length 1, to compare by cosine (the best of the Q is an
                image's score for a text, as `search` ranks). "prefix": [B, Q, D], what the language model reads, in the
                units of its token embeddings. None: features where the bundle searches, else the prefix.
            question: Of a prefix, where it conditions the queries; None is the prefix of a caption.
        """
        if kind not in (None, "features", "prefix"):
            raise InputError(f"kind: expected 'features' or 'prefix', found {kind!r}")
        sources = sources_of(images)
        if kind == "prefix" or (kind is None and not self.searches):
            return self._answering("embed").prefixes([Request(image, question) for image in sources])
        if question is not None:
            raise InputError("question: features are of images alone; leave it out, or ask for kind='prefix'")
        return self._searching("embed").image_features(sources)

    def search(
        self,
        index: Index | Path | str,
        text: str | None = None,
        *,
        image: ImageSource | None = None,
        top: int = 5,
        candidates: int = CANDIDATES,
    ) -> list[tuple[str, Hit]]:
        """Find images by a text, or texts by an image; (image path or text, hit), the best first.

        Args:
            index: What `qforge index` made; an opened `Index` spares its check, which reads the features once.
            text: What to look for, in an index of images.
            image: What to find texts for, in an index of texts.
            top: How many hits at most.
            candidates: Best of the contrastive ranking that matching looks at again; 0: none, which is fastest.

        Raises:
            MissingFile, DataError: no index there, or a damaged one.
        """
        retrieval = self._searching("search")
        if (text is None) == (image is None):
            found = "neither" if text is None else "both"
            raise InputError(f"search: expected either a text or image=, found {found}")
        opened = index if isinstance(index, Index) else Index(Path(index))
        if text is not None:
            return opened.find_images(retrieval, [text], top=top, candidates=candidates)[0]
        assert image is not None
        return opened.find_texts(retrieval, [image], top=top, candidates=candidates)[0]

    def close(self) -> None:
        """Free the graphs; a call after that is an InputError."""
        with self._lock:
            self._closed = True
            for half in (self._retrieval, self._pipeline):
                if half is not None:
                    half.close()

    def __repr__(self) -> str:
        does = " and ".join(word for word, can in (("answers", self.answers), ("searches", self.searches)) if can)
        manifest, state = self.bundle.manifest, "closed" if self._closed else "open"
        device = f"{self._device.backend} on {self._device.provider}"
        return f"<qforge.Model {self.bundle.path}: {does}, {manifest.precision}, {device}, {state}>"

    def _answering(self, method: str) -> Pipeline:
        if self._pipeline is None:
            raise InputError(
                f"{method}: {self.bundle.path} searches and cannot answer; export the checkpoint with a language "
                f"model: qforge export CKPT --heads both (or generate)"
            )
        return self._pipeline

    def _searching(self, method: str) -> Retrieval:
        if not self.searches:
            raise InputError(
                f"{method}: {self.bundle.path} answers and cannot search; export a checkpoint that has the heads: "
                f"qforge export CKPT --heads both (or retrieval)"
            )
        with self._lock:
            if self._closed:
                raise InputError(f"{self.bundle.path}: this bundle was closed; load it again")
            if self._retrieval is None:
                self._retrieval = Retrieval(self.bundle, device=self._borrower, cache=self.cache)
            return self._retrieval


def load(
    bundle: str | Path,
    backend: str | None = None,
    threads: int | None = None,
    cache_bytes: int = 256 * 1024**2,
    provider: Provider | None = None,
    cache_dir: str | Path | None = None,
    cache_dir_bytes: int | None = None,
    batch_wait_ms: float | None = None,
) -> Model:
    """Read a bundle, check every byte of it and open what it answers (or else searches) with.

    Args:
        bundle: The folder that `qforge export` made, with any heads.
        backend: Engine to run the graphs with, 'ort' or 'trt'; see `runtime.backends.available_backends`. None is
            'ort', or with neither `threads` nor `provider` what `qforge tune` found fastest for this bundle here.
        threads: CPU threads per graph; None takes the physical cores this process may use.
        cache_bytes: Bound of what is remembered in memory (bytes), images and prompts; 0 remembers neither.
        provider: What computes under backend 'ort': cpu (None), cuda, tensorrt or openvino; never another one silently.
        cache_dir: Folder of a query cache on the disk, which processes share; made when missing. None for none.
        cache_dir_bytes: Bound of that folder (bytes), for all who use it from now on; None leaves its own (at first
            4 GiB).
        batch_wait_ms: A number runs the calls of several threads as one batch, None each alone; see `runtime.load`.

    Raises:
        BundleError: the bundle is damaged, incomplete or of another format.
        BackendUnavailable: the package of the backend or provider is not installed, or the provider cannot start.
        InputError: an unknown backend or provider, a bad number, or a `cache_dir` that is not a cache's.
    """
    opened, device = read_bundle(bundle), device_of(bundle, backend, provider, threads)
    disk = None if cache_dir is None else DiskCache(cache_dir, opened.manifest.digest, device, cache_dir_bytes)
    return Model(opened, device=device, cache_bytes=cache_bytes, disk=disk, batch_wait_ms=batch_wait_ms)
