"""The verb that talks: questions from the terminal or a pipe, answers as they are said; without torch."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qforge.console import Outcome, emit
from qforge.verbs_cache import warned
from runtime.backends import Device
from runtime.chat import Chat, ChatAnswer
from runtime.decoding import Decoding
from runtime.errors import InputError
from runtime.model import load


@dataclass(frozen=True)
class How:
    """What is told of the answers."""

    prompt: str | None
    max_new_tokens: int | None
    image_size: int | None
    decoding: Decoding
    cache_dir: Path | None


def chat(bundle: Path, image: Path, how: How, device: Device) -> Outcome:
    """Answers until the questions end, or Ctrl-C; every answer is printed when it is there."""
    at_terminal = sys.stdin.isatty()
    answers, refused = list[ChatAnswer](), list[dict[str, str]]()
    with load(bundle, device.backend, device.threads, provider=device.provider, cache_dir=how.cache_dir) as model:
        talk = model.chat(
            image,
            prompt=how.prompt,
            image_size=how.image_size,
            max_new_tokens=how.max_new_tokens,
            decoding=how.decoding,
        )
        try:
            for line in _lines(at_terminal):
                try:
                    question = _decoded(line)
                    answer = _said(talk, question, how.decoding, "\n" if answers and not at_terminal else "")
                except (InputError, MemoryError) as error:
                    print(error, file=sys.stderr)
                    refusal = {"question": line.decode("utf-8", "backslashreplace"), "error": str(error)}
                    refused.append(refusal)
                    emit(refusal, "")
                    continue
                emit(answer.as_json(), "\n" if at_terminal else "")
                if answer.dropped_turns > (answers[-1].dropped_turns if answers else 0):
                    print(f"(oldest turns left out, as they no longer fit: {answer.dropped_turns})", file=sys.stderr)
                answers.append(answer)
        except KeyboardInterrupt:  # an end like any other: what was answered stands
            pass
        cache = warned(model.cache.statistics())
    data = {"results": [answer.as_json() for answer in answers], "refused": refused, "cache": cache}
    return Outcome(data, "", 2 if refused and not at_terminal else 0)


def _said(talk: Chat, question: str, decoding: Decoding, before: str) -> ChatAnswer:
    """The answer, printed as it is said; at once where that is known only at the end. `before` stands before it."""
    if decoding.width > 1:
        answer = talk.ask(question)
        emit(None, before + "\n".join(answer.texts))
        return answer
    for piece in talk.stream(question):
        emit(None, before + piece.text)
        before = ""
    assert isinstance(piece.answer, ChatAnswer)
    return piece.answer


def _lines(at_terminal: bool) -> Iterator[bytes]:
    """Questions as they are typed or piped; lines without words are passed over."""
    while True:
        if at_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"question: expected UTF-8, found other bytes at byte {error.start + 1}") from error
