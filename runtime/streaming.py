"""Text while it is said: pieces that never change, and that together are the answer's text."""

import re
from dataclasses import dataclass
from typing import Any

from runtime.answers import Answer
from runtime.tokenizer import TextTokenizer

UNSPACED = re.compile(
    "["
    "\u2e80-\u2fdf\u3001-\u33ff"  # radicals, CJK punctuation, kana, Bopomofo, enclosed and squared forms
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"  # Han
    "\ufe30-\ufe4f\uff01-\uff9f"  # vertical, full-width and half-width forms
    "]"
)
"""A character of a script that puts no spaces between words: it ends a word wherever it stands."""


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

    That is all before the last white space, and all up to the last character of a script without spaces (Chinese,
    Japanese): another word may go on, half a UTF-8 character is no character yet, and some tokenizers take a space back
    before a full stop. Bytes that a tokenizer spells out one by one are held back too, as all of them together decide
    what they mean.
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
        text = self._tokenizer.decode(self._ids[:certain])
        words = text.rsplit(maxsplit=1)
        spaced = len(words[0]) if len(words) == 2 else 0
        unspaced = max((found.end() for found in UNSPACED.finditer(text, spaced)), default=0)
        return self._show(text[: max(spaced, unspaced)])

    def end(self) -> tuple[str, str]:
        """(what was still held back, the whole text)."""
        text = self._tokenizer.decode(self._ids)
        return self._show(text), text

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece
