"""Retrieval measured by training, alone and on two processes, is what the one scorer of retrieval says."""

import threading
from typing import Any

import pytest
import torch

from runtime.dataset import read_manifest
from runtime.progress import Progress
from runtime.recall import evaluate_retrieval
from trainer.blip2 import Blip2, new_blip2
from trainer.config import ModelConfig
from trainer.data import ResolvedData
from trainer.ranks import Ranks
from trainer.reranking import reranked_recall
from trainer.retrieval import EagerRetrieval

QUIET = Progress(quiet=True)


class Threads(Ranks):
    """One of several threads that stand for processes: they tell each other values, and nothing else."""

    def __init__(self, index: int, told: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.index, self.count, self._told, self._barrier = index, len(told), told, barrier

    def collect(self, value: Any) -> list[Any]:
        self._told[self.index] = value
        self._barrier.wait()
        everyone = list(self._told)
        self._barrier.wait()
        return everyone


@pytest.fixture(scope="module")
def model(model_config: ModelConfig) -> Blip2:
    torch.manual_seed(0)
    return new_blip2(model_config, question_conditioned=False).eval()


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_recall_is_that_of_evaluate(processes: int, model: Blip2, data: ResolvedData) -> None:
    rows = read_manifest(data.captions_test[0].path)
    expected = evaluate_retrieval(EagerRetrieval(model), rows, candidates=10, progress=QUIET).metrics
    told, barrier, found = [None] * processes, threading.Barrier(processes), list[dict[str, float]]()

    def measure(index: int) -> None:
        ranks = Threads(index, told, barrier)
        found.append(reranked_recall(model, rows, candidates=10, ranks=ranks, progress=QUIET))

    threads = [threading.Thread(target=measure, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * processes
    assert {"itm_text_to_image_r1", "itc_image_to_text_r10"} <= expected.keys()
    assert 0 < expected["itm_image_to_text_r10"] < 1, "neither everything nor nothing is found"
