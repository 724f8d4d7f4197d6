"""Questions about one image, each with what was said before: multi-turn VQA.

    chat = model.chat("photo.jpg")
    chat.ask("what is on the table?")
    chat.ask("which colour is it?").text

The history is written into the language model's prompt, from the same template as a single question. A Q-Former that
reads a text is given the last question alone. The image is read once, and pays for vision once.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.answers import Answer, Request
from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError
from runtime.pipeline import Pipeline
from runtime.preprocess import ImageSource, load_image
from runtime.streaming import Piece

Turns = Sequence[tuple[str, str | None] | tuple[str] | str]
"""(question, answer) pairs, the oldest first; the last is the question to answer: (question, None), or the text."""


@dataclass(frozen=True)
class ChatAnswer(Answer):
    """An answer, and how much of the conversation it was given with."""

    dropped_turns: int = 0
    """How many of the oldest turns the bundle had no positions for; they were left out whole."""

    def as_json(self) -> dict[str, Any]:
        """The keys of an answer, and `dropped_turns`."""
        return super().as_json() | {"dropped_turns": self.dropped_turns}


class Chat:
    """A conversation about one image. One thread's, as it has one order; the pipeline behind it is shared safely."""

    def __init__(
        self,
        pipeline: Pipeline,
        image: ImageSource,
        *,
        prompt: str | None = None,
        image_size: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding = GREEDY,
        turns: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Read the image; `turns` went before, and the rest is as in `runtime.answers.Request` and `Pipeline.answer`.

        Raises:
            ImageError: the image cannot be read.
        """
        self._pipeline = pipeline
        self._name = str(image) if isinstance(image, str | Path) else None
        self._about = Request(load_image(image), prompt=prompt, image_size=image_size)
        self._max_new_tokens, self._decoding = max_new_tokens, decoding
        self._turns = list(turns)

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Every question with its answer, the oldest first, those included that prompts have no room for any more."""
        return tuple(self._turns)

    def ask(self, question: str) -> ChatAnswer:
        """Answer one more question; it and its (first) answer become a turn.

        Turns go, the oldest first, when the bundle's positions run out; `dropped_turns` of the answer counts them.

        Raises:
            InputError: as `Pipeline.vqa`; also when the question does not fit alone. The conversation is as it was.
        """
        request = self._request(question)
        (answer,) = self._pipeline.answer([request], max_new_tokens=self._max_new_tokens, decoding=self._decoding)
        return self._told(request, answer)

    def stream(self, question: str) -> Iterator[Piece]:
        """The same while it is said; the last piece has the `ChatAnswer`, and only then is there one turn more.

        Raises:
            InputError: as `ask`, before the first piece; several beams or sequences.
        """
        request = self._request(question)
        pieces = self._pipeline.stream(request, max_new_tokens=self._max_new_tokens, decoding=self._decoding)
        return self._pieces(request, pieces)

    def _pieces(self, request: Request, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if piece.answer is None:
                yield piece
            else:
                yield dataclasses.replace(piece, answer=self._told(request, piece.answer))

    def _request(self, question: str) -> Request:
        request = dataclasses.replace(self._about, question=question, turns=self.turns)
        return self._pipeline.fitted(request, self._max_new_tokens)

    def _told(self, request: Request, answer: Answer) -> ChatAnswer:
        dropped = len(self._turns) - len(request.turns)
        self._turns.append((str(request.question), answer.text))
        fields = {field.name: getattr(answer, field.name) for field in dataclasses.fields(Answer)}
        return ChatAnswer(**(fields | {"image": self._name}), dropped_turns=dropped)


def split_turns(turns: Turns) -> tuple[list[tuple[str, str]], str]:
    """(the turns that went before, the question to answer); InputError when they are not questions with answers."""
    if isinstance(turns, str) or not turns:
        raise InputError('turns: expected a list such as [("what is it?", "a circle"), "which colour?"], found none')
    *before, last = turns
    question, *answer = (last,) if isinstance(last, str) else last
    if question is None or answer not in ([], [None]):
        raise InputError(f"turns: expected a question without an answer as the last turn, found {last!r}")
    history = list[tuple[str, str]]()
    for number, turn in enumerate(before, 1):
        if isinstance(turn, str) or len(turn) != 2 or turn[1] is None:
            raise InputError(f"turns: expected (question, answer) as turn {number}, found {turn!r}")
        history.append((turn[0], turn[1]))
    return history, question
