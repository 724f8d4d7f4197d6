"""The processes that train together: who this one is, and what they tell each other.

`torchrun` and `accelerate launch` start one process per device; `join` finds out. One process alone has the same
interface and never communicates, so nothing else asks how many there are.

Every method but the properties must be called by all processes in the same order.
"""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from runtime.errors import QforgeError

PATIENCE = datetime.timedelta(hours=6)
"""Longest wait for the others: the first process may draw data or measure while they wait."""
_Told = TypeVar("_Told")


class PeerLost(QforgeError, ConnectionError):
    """Another process of this run has ended."""


# Shape letters: B rows of this process, R processes, K chosen rows
class Ranks:
    """One process alone."""

    index = 0
    """Number of this process."""
    count = 1
    """Processes that train together."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def gather(self, tensor_B: Tensor) -> Tensor:
        """Rows of all processes in order [R * B, ...], without gradient; every process has as many."""
        return tensor_B.detach()

    def gather_with_gradient(self, tensor_B: Tensor) -> Tensor:
        """As `gather`; the gradients that all processes have for a row are summed where the row came from."""
        return tensor_B

    def fetch_rows(self, tensor_B: Tensor, places_K: Tensor) -> Tensor:
        """Rows [K, ...] at these places of the global batch; only they are sent. Gradients return to their owner.

        `places_K` differ from process to process; their number may, too.
        """
        return tensor_B[places_K]

    def all_true(self, flag: bool) -> bool:
        """Whether it is so on every process."""
        return flag

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, element by element, without gradient; a NaN of one is a NaN for all."""
        return tensor.detach()

    def collect(self, value: _Told) -> list[_Told]:
        """Everybody's small Python value, by process."""
        return [value]

    def tell(self, value: _Told) -> _Told:
        """The main process' small Python value."""
        return value

    def barrier(self) -> None:
        """Wait until all are here."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in here because another process has ended becomes `PeerLost`."""
        yield


class DistributedRanks(Ranks):
    """One of several processes, over torch.distributed (NCCL on GPUs, gloo on CPUs)."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device)
        self.index, self.count = dist.get_rank(), dist.get_world_size()

    def gather(self, tensor_B: Tensor) -> Tensor:
        own = tensor_B.detach().contiguous()
        everyone = own.new_empty(self.count, *own.shape)
        dist.all_gather(list(everyone), own)
        return everyone.flatten(0, 1)

    def gather_with_gradient(self, tensor_B: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(tensor_B, self)
        return gathered

    def fetch_rows(self, tensor_B: Tensor, places_K: Tensor) -> Tensor:
        per_process = tensor_B.shape[0]
        order_K = torch.argsort(places_K, stable=True)  # so that what one process sends lies together
        wanted = torch.bincount(places_K // per_process, minlength=self.count)
        asked = torch.empty_like(wanted)
        dist.all_to_all_single(asked, wanted)
        here, there = wanted.tolist(), asked.tolist()
        places = _exchange(places_K[order_K], here, there)
        received: Tensor = _Exchange.apply(tensor_B[places - self.index * per_process], there, here)
        return received[torch.argsort(order_K)]

    def all_true(self, flag: bool) -> bool:
        verdict = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return bool(verdict)

    def mean(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def collect(self, value: _Told) -> list[_Told]:
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, value)
        return everyone

    def tell(self, value: _Told) -> _Told:
        told: list[Any] = [value]
        dist.broadcast_object_list(told, src=0, device=self.device)
        heard: _Told = told[0]
        return heard

    def barrier(self) -> None:
        dist.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, QforgeError) or not (isinstance(error, dist.DistError) or _of_transport(error)):
                raise
            raise PeerLost(
                f"another of the {self.count} processes of this run has ended, so process {self.index} ends too; what "
                f"that one said is the reason. Finished steps and resume points are kept: start the same command again"
            ) from error


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor_B: Tensor, ranks: DistributedRanks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, tensor_B.shape[0]
        return ranks.gather(tensor_B)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.ranks.index * ctx.rows :][: ctx.rows], None


def _of_transport(error: RuntimeError) -> bool:
    """Whether gloo or NCCL could not reach a process; they say so in words alone."""
    return any(name in str(error) for name in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"))


def _exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send `sent[r]` rows, in order, to every process r; returns those that it sends here."""
    heard = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(heard, rows.contiguous(), received, sent)
    return heard


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _exchange(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(gradients[0], ctx.received, ctx.sent), None, None


def join() -> Ranks:
    """This process among those that a launcher started with it; alone, when none did."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    device = torch.device("cpu") if on_cpu else state.device
    return Ranks(device) if state.num_processes == 1 else DistributedRanks(device)
