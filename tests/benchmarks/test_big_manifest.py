"""Training on 200,000 rows: what they cost in memory and time, against a thousand. 5 million: the committed result."""

import json
from pathlib import Path

from benchmarks.big_manifest import measure
from trainer.sources.rows import SMALL_BYTES

MIB = 2**20
RESULT = Path(__file__).parents[2] / "benchmarks/results/big-manifest.json"


def test_rows_cost_next_to_nothing(tmp_path: Path) -> None:
    found = measure(200_000, tmp_path)
    assert found["manifest_bytes"] > SMALL_BYTES, "so that the index goes to the disk"
    for run in ("index_built", "index_there"):
        assert found[run]["resident_bytes_growth"] < 50 * MIB, "a list of these rows takes 200 MiB"
        assert found[run]["peak_bytes_growth"] < 80 * MIB
        assert found[run]["first_batch_cpu_s"] < found["small"]["first_batch_cpu_s"] + 5
    assert not list(tmp_path.rglob("*.jsonl")), "the manifest goes again"


def test_the_committed_result_holds_the_promise() -> None:
    result = json.loads(RESULT.read_text())
    assert result["rows"] == 5_000_000
    for run in ("index_built", "index_there"):
        assert result[run]["resident_bytes_growth"] < 200e6 and result[run]["peak_bytes_growth"] < 200e6
        assert result[run]["first_batch_s"] < 10, "from the start of the process, imports and all"
