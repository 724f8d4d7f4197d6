"""What is asked and what comes back; the same for the bundle and for eager PyTorch.

`runtime.pipeline.Pipeline` and the trainer's eager pipeline both satisfy `Answerer`, so evaluation, benchmarks and the
command line compare them without knowing which is which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError
from runtime.preprocess import ImageSource
from runtime.text import fill_prompt, require_text, with_history


@dataclass(frozen=True)
class Request:
    """One image to caption, or to answer a question about."""

    image: ImageSource
    """A path, encoded bytes, a PIL image, or a uint8 array (height, width[, channels])."""
    question: str | None = None
    """None asks for a caption."""
    prompt: str | None = None
    """Replaces the model's own prompt; with a question it holds one `{}` where the question goes."""
    image_size: int | None = None
    """Side (pixels) that the image is read at, one that the bundle was exported for; None: the trained one."""
    turns: tuple[tuple[str, str], ...] = ()
    """Questions about this image that went before, each with its answer, the oldest first; see `runtime.chat`."""

    @property
    def image_name(self) -> str | None:
        """The path as it was given; None when the image came without one."""
        return str(self.image) if isinstance(self.image, str | Path) else None

    def filled_prompt(self, *, caption: str, vqa: str) -> str:
        """What the language model reads: the earlier turns, and this request's own prompt behind them.

        Raises:
            InputError: as `own_prompt`; earlier turns without a question.
        """
        own = self.own_prompt(caption=caption, vqa=vqa)
        if not self.turns:
            return own
        if self.question is None:
            raise InputError("turns: expected a question behind the earlier ones, found none; a caption has no history")
        return with_history(self.turns, vqa if self.prompt is None else self.prompt, own)

    def own_prompt(self, *, caption: str, vqa: str) -> str:
        """This request's prompt without its history: its own template, or else the model's for a caption or a question.

        A Q-Former that reads prompts is given this one: it takes few tokens, and it is the last question that tells
        what to look for.

        Raises:
            InputError: the template does not fit (see `runtime.text.fill_prompt`), or prompt, question or a turn is no
                text (see `runtime.text.require_text`).
        """
        for name, text in (("prompt", self.prompt), ("question", self.question)):
            if text is not None:
                require_text(text, name)
        for question, answer in self.turns:
            require_text(question, "turns: question")
            require_text(answer, "turns: answer")
        template = self.prompt
        if template is None:
            template = caption if self.question is None else vqa
        return fill_prompt(template, self.question)


@dataclass(frozen=True)
class Alternative:
    """Another text for the same request."""

    text: str
    token_ids: tuple[int, ...]
    """Generated ids, the end token excluded."""


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    image: str | None
    """The image's path as it was given; None when it came without one."""
    question: str | None
    """The question as it was asked; None for a caption."""
    text: str
    """The caption or the answer."""
    token_ids: tuple[int, ...]
    """Generated ids, the end token excluded."""
    timings_ms: dict[str, float]
    """Wall time of the whole batch by phase: preprocess, vision, qformer, prefill, decode, total (milliseconds).

    Of a `BatchedPipeline`: of this request, with what it ran together with, and a phase `queue`.
    """
    alternatives: tuple[Alternative, ...] = ()
    """The other `num_return_sequences` texts, the best beam first."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text, the answer's own first."""
        return (self.text, *(other.text for other in self.alternatives))

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated, the end token not counted."""
        return len(self.token_ids)

    def as_json(self) -> dict[str, Any]:
        """The five public keys, ready for `json.dumps`; `alternatives` is a sixth where there are any."""
        others = [{"text": other.text, "token_ids": list(other.token_ids)} for other in self.alternatives]
        return {
            "image": self.image,
            "question": self.question,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "timings_ms": dict(self.timings_ms),
            **({"alternatives": others} if others else {}),
        }


class Answerer(Protocol):
    """Anything that answers a batch of requests."""

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer all requests as one batch; None takes the model's own token limit."""
        ...
