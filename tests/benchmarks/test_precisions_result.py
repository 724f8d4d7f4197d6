"""What the committed measurement of precisions promises: README and LOG.md speak of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.precisions import FORMS, SIZES

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "precisions.json"
INT8 = ("int8", "onnxruntime")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    result = json.loads(RESULT.read_text())
    assert result["model"] == SIZES
    found: list[dict[str, Any]] = result["rows"]
    return found


def test_every_form_of_every_graph_was_measured(rows: list[dict[str, Any]]) -> None:
    for names, place in ((("vision", "qformer"), 0), (("language", "encoder", "decoder"), 1)):
        expected = {(name, form[place], form[2]) for name in names for form in FORMS}
        assert expected == {(r["graph"], r["precision"], r["target"]) for r in rows if r["graph"] in names}


def test_int8_on_a_cpu_is_small_fast_and_close(rows: list[dict[str, Any]]) -> None:
    int8 = [r for r in rows if r["graph"] in ("vision", "qformer") and (r["precision"], r["target"]) == INT8]
    assert len(int8) == 2
    assert sum(r["bytes"] for r in int8) <= 0.27 * sum(r["fp32_bytes"] for r in int8)
    for row in int8:
        assert row["worst_cosine"] >= 0.998
        assert row["times_faster"] >= 2.3
        assert row["verified"] == "executed"
