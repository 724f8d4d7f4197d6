"""Results are JSON, whole and readable."""

import json

import pytest

from benchmarks.results import json_lines, json_text

VALUE = {"samples_ms": [1.5, 2.25, 3.0], "names": ["a", "b"], "empty": [], "nested": [{"x": [1, 2]}], "none": None}


def test_reads_back_and_keeps_samples_on_one_line() -> None:
    text = json_text(VALUE)
    assert json.loads(text) == VALUE
    assert '"samples_ms": [1.5, 2.25, 3.0],\n' in text
    assert '"x": [1, 2]\n' in text


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_text({"x": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        json_lines([{"x": float("inf")}])


def test_one_line_per_object() -> None:
    assert json_lines([{"a": "é"}, {"b": 1}]) == '{"a": "é"}\n{"b": 1}\n'
