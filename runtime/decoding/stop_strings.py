"""When a text has said one of the strings that end it."""

from collections.abc import Sequence

from runtime.tokenizer import TextTokenizer


class StopStrings:
    """Says whether tokens contain a stop string; satisfies `runtime.decoding.task.Stops`.

    Asked after every token, it is first true at the token that completes the string, whatever else that token says.
    """

    def __init__(self, tokenizer: TextTokenizer, strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, tuple(strings)

    def __call__(self, ids: Sequence[int]) -> bool:
        """Whether these tokens, all that were said, contain one."""
        text = self._tokenizer.continuation(ids)
        return any(string in text for string in self._strings)
