"""Text while it is said: pieces that never change, and that together are the answer's text."""

from dataclasses import dataclass
from typing import Any

from runtime.answers import Answer
from runtime.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Piece:
    """What one more token made certain of a text."""

    text: str
    """Goes behind the pieces before it; empty while a word is unfinished."""
    token_ids: tuple[int, ...]
    """The token that was said; none in the last piece."""
    answer: Answer | None = None
    """The whole answer, in the last piece alone."""

    def as_json(self) -> dict[str, Any]:
        """One line of a stream, ready for `json.dumps`."""
        return {"piece": self.text, "token_ids": list(self.token_ids)}


class SteadyText:
    """Tokens → the part of their text that no further token changes.

    That is all before the last white space: a word may go on, half a UTF-8 character is no character yet, and some
    tokenizers take a space back before a full stop. Bytes that a tokenizer spells out one by one are held back too, as
    all of them together decide what they mean.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def put(self, token: int) -> str:
        """One token more; what its text adds for certain."""
        self._ids.append(token)
        certain = len(self._ids)
        while certain and self._tokenizer.is_byte(self._ids[certain - 1]):
            certain -= 1
        words = self._tokenizer.decode(self._ids[:certain]).rsplit(maxsplit=1)
        return self._show(words[0] if len(words) == 2 else "")

    def end(self) -> tuple[str, str]:
        """(what was still held back, the whole text)."""
        text = self._tokenizer.decode(self._ids)
        return self._show(text), text

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece
