"""The gate fails what it must and nothing else."""

from typing import Any

from benchmarks.gate import check


def result(precision: str, language: str = "fp32", *, equal: int = 100, difference: float = 0.0) -> dict[str, Any]:
    against = {"tokens": {"equal": equal, "n": 100}, "difference": {"accuracy": {"value": difference}}}
    return {
        "pipelines": {
            "eager": {"kind": "eager", "precision": "fp32"},
            "b": {"kind": "bundle", "precision": precision, "language_precision": language},
        },
        "accuracy": {"vqa": {"pipelines": {"eager": {}, "b": {"against_eager": against}}}},
    }


def test_fp32_must_agree_on_every_item() -> None:
    assert check(result("fp32"), max_drop=1.0) == []
    (failure,) = check(result("fp32", equal=99), max_drop=1.0)
    assert "on all 100 items, found them on 99" in failure


def test_quantised_may_lose_max_drop_and_no_more() -> None:
    assert check(result("int8", equal=50, difference=-0.01), max_drop=1.0) == []
    assert check(result("int8", equal=50, difference=0.2), max_drop=0.0) == []
    (failure,) = check(result("int8", difference=-0.0125), max_drop=1.0)
    assert failure == "b: vqa: expected at most 1 points of accuracy lost against eager, found 1.25"


def test_one_quantised_part_makes_a_quantised_bundle() -> None:
    assert check(result("fp32", "int8", equal=50, difference=-0.005), max_drop=1.0) == []
    assert len(check(result("fp32", "int8", difference=-0.02), max_drop=1.0)) == 1
