"""Two exports of one checkpoint are the same graphs, byte for byte, whoever makes them and wherever they lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export import trace
from export.config import ExportConfig
from runtime.bundle import Bundle, read_bundle
from runtime.files import sha256_of
from tests.export.conftest import Export

ROOT = Path(__file__).parent.parent.parent
LARGEST_BYTES = 50_000
"""Instead of 1 GiB: the tiny graphs then lie on both sides, with their weights inside and beside them."""
CONFIG = ExportConfig(
    calibration_images=6, verification_images=2, max_batch=2, reference_items=2, language_precision="int8"
)
IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from export import trace
from export.config import ExportConfig
from tests.export.conftest import Export

trace.LARGEST_SINGLE_FILE_BYTES = int(sys.argv[1])
checkpoint, out, *manifests = map(Path, sys.argv[3:])
Export(checkpoint, manifests)(out, ExportConfig.model_validate_json(sys.argv[2]), precision="int8")
"""


def test_two_whole_exports_give_the_same_files(
    checkpoint: Path, manifests: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, calibrated and quantised twice; nothing is taken over. The other process hashes its strings in another
    order, so that no order of a set may reach a file."""
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": other}
    arguments = map(
        str, (LARGEST_BYTES, CONFIG.model_dump_json(), checkpoint, tmp_path / "elsewhere" / "second", *manifests)
    )
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(trace, "LARGEST_SINGLE_FILE_BYTES", LARGEST_BYTES)
    first = read_bundle(Export(checkpoint, manifests)(tmp_path / "first", CONFIG, precision="int8"))
    second = read_bundle(tmp_path / "elsewhere" / "second")
    assert hashes(first) == hashes(second)
    assert first.manifest.graphs == second.manifest.graphs
    beside = {name for name, graph in first.manifest.graphs.items() if graph.data is not None}
    assert beside and beside != first.manifest.graphs.keys(), "weights of some graphs lie beside them, of others inside"


def hashes(bundle: Bundle) -> dict[str, str]:
    """File → SHA-256, of everything in the folder of the graphs."""
    return {path.name: sha256_of(path) for path in (bundle.path / "onnx").iterdir()}
