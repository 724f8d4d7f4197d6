"""The README's commands work as written: every block marked `<!-- run -->` is run, in order, in one empty folder.

Only the recipe is exchanged: `recipes/demo.yaml` takes minutes, `recipes/smoke.yaml` walks the same line in one.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCE = "`" * 3
BLOCKS = re.compile(rf"<!-- run -->\n{FENCE}(bash|python)\n(.*?){FENCE}", re.S)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_readme_blocks_run(tmp_path: Path) -> None:
    blocks = BLOCKS.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks, "README.md has no block marked <!-- run -->"
    for folder in ("recipes", "examples"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tmp_path / folder)
    beside_python = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{beside_python}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for language, block in blocks:
        text = block.replace("recipes/demo.yaml", "recipes/smoke.yaml")
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"this README block failed:\n{block}\n{done.stdout}\n{done.stderr}"
