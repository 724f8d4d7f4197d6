"""Text ↔ ids with the tiny bundle's tokenizer."""

import pytest
from tokenizers import Tokenizer

from runtime.errors import BundleError
from runtime.tokenizer import TextTokenizer


def test_round_trip(tiny_bundle):
    tokenizer = TextTokenizer(tiny_bundle / "tokenizer.json")
    assert tokenizer.encode("a red photo") == [1, 3, 4, 7]
    assert tokenizer.encode("a red photo", special=False) == [3, 4, 7]
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode([1, 3, 4, 2]) == "a red"
    assert tokenizer.decode([]) == ""


def test_truncation_and_padding_left_in_the_file_are_off(tiny_bundle, tmp_path):
    inner = Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer(tmp_path / "tokenizer.json").encode("a red photo") == [1, 3, 4, 7]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "tokenizer.json", tmp_path / "none.json"):
        with pytest.raises(BundleError, match=path.name):
            TextTokenizer(path)
