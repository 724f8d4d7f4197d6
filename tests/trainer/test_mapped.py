"""Frozen halves in files: the same numbers, ties kept, no memory of their own, nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.blip2 import new_blip2
from trainer.config import ModelConfig
from trainer.mapped import map_weights

MEASURED = """
import sys
from pathlib import Path
import torch
from trainer.mapped import map_weights

def anonymous_kb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = anonymous_kb()
layer = torch.nn.Linear(8192, 4096)
loaded = anonymous_kb()
map_weights(layer, Path(sys.argv[1]))
float(layer(torch.ones(1, 8192)).sum())  # every page is read
print(before, loaded, anonymous_kb())
"""


def test_a_mapped_half_computes_the_same_and_keeps_its_ties(tmp_path: Path) -> None:
    plain = new_blip2(ModelConfig(), True)
    mapped = new_blip2(ModelConfig(), True, mapped_beside=tmp_path / "bundle")
    for ours, theirs in ((mapped.vision, plain.vision), (mapped.language_model, plain.language_model)):
        names = [name for name, _ in ours.named_parameters()]
        assert names == [name for name, _ in theirs.named_parameters()]
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other) and not mine.requires_grad
    language = mapped.language_model
    assert language.get_input_embeddings().weight is language.get_output_embeddings().weight
    ids = torch.arange(6)[None]
    assert torch.equal(language(ids).logits, plain.language_model(ids).logits)
    assert not list(tmp_path.iterdir())


def test_mapped_weights_take_no_memory_of_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True, check=True
    )
    before, loaded, mapped = map(int, done.stdout.split())
    weights_kb = 4 * 8192 * 4096 // 1024
    assert loaded - before > 0.9 * weights_kb
    assert mapped - before < 0.3 * weights_kb


def test_weights_of_another_type_are_not_mapped(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="float16"):
        map_weights(nn.Linear(2, 2).half(), tmp_path / "x")
