"""Several processes of a run as threads of one: what they exchange keeps its graph, so gradients can be compared."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.ranks import Ranks

_Result = TypeVar("_Result")


class ThreadRanks(Ranks):
    """One of `count` threads; rows are exchanged through a shared list."""

    def __init__(self, index: int, shelf: list[Any], barrier: threading.Barrier) -> None:
        super().__init__("cpu")
        self.index, self.count = index, len(shelf)
        self._shelf, self._barrier = shelf, barrier
        self.sent = 0
        """Rows that others fetched from here or this one from others."""

    def _all(self, value: Any) -> list[Any]:
        self._shelf[self.index] = value
        self._barrier.wait(20)
        found = list(self._shelf)
        self._barrier.wait(20)
        return found

    def gather(self, tensor_B: Tensor) -> Tensor:
        return torch.cat(self._all(tensor_B.detach()))

    def gather_with_gradient(self, tensor_B: Tensor) -> Tensor:
        return torch.cat(self._all(tensor_B))

    def fetch_rows(self, tensor_B: Tensor, places_K: Tensor) -> Tensor:
        self.sent += len(places_K)
        return torch.cat(self._all(tensor_B))[places_K]

    def mean(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all(tensor.detach())).mean(0)


def together(count: int, work: Callable[[Ranks], _Result]) -> list[_Result]:
    """`work` on `count` ranks at once; results by rank."""
    shelf, barrier = [None] * count, threading.Barrier(count)
    results, failed = dict[int, _Result](), list[BaseException]()

    def one(index: int) -> None:
        try:
            results[index] = work(ThreadRanks(index, shelf, barrier))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return [results[index] for index in range(count)]
