"""Text ↔ token ids from a bundle's tokenizer.json, without transformers."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from runtime.errors import BundleError

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""How SentencePiece names the tokens that spell out one byte each."""


class TextTokenizer:
    """One tokenizer file in Hugging Face's `tokenizers` format."""

    def __init__(self, path: Path | str) -> None:
        """Read the file; BundleError when it is not a tokenizer."""
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every cause
            raise BundleError(f"{path}: expected a tokenizer in Hugging Face format, found other data") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()  # what is too long is the caller's decision
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._byte_ids = frozenset(vocabulary[token] for token in BYTES if token in vocabulary)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds the model's own start and end tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out, outer white space stripped."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def continuation(self, ids: Sequence[int]) -> str:
        """What token ids add to a text that is there already: white space and special tokens as they are."""
        before = self.encode("abcdef", special=False)
        texts = [str(self._tokenizer.decode(some, skip_special_tokens=False)) for some in (before, [*before, *ids])]
        return texts[1][len(texts[0]) :]

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is one byte of a character that the vocabulary has no token for."""
        return token_id in self._byte_ids


def cut(ids: list[int], limit: int) -> list[int]:
    """Ids within `limit`: a longer text loses its tail and keeps its end token, as published (LAVIS max_txt_len)."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
