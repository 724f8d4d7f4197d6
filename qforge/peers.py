"""The processes of one command, when torchrun or accelerate launch started several of them.

The first does everything; the others take part in the steps that all do together (training) and end after the last.
One process alone loads nothing for this.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

_Told = TypeVar("_Told")


class Peers(Protocol):
    """What the steps of a run need of them; `trainer.ranks.Ranks` has it."""

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        ...

    def tell(self, value: _Told) -> _Told:
        """The first process' value, on all; every process calls it."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Turn the loss of another process into one sentence."""
        ...


class Alone:
    """The only process."""

    is_main = True

    def tell(self, value: _Told) -> _Told:
        """The value."""
        return value

    def together(self) -> AbstractContextManager[None]:
        """Nothing to turn."""
        return nullcontext()


def join() -> Peers:
    """This process among those a launcher started with it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone()
    from runtime.errors import require

    require("torch", extra="train", why="Training on several processes")
    from trainer.ranks import join

    return join()


def is_follower() -> bool:
    """Whether results and lines are for another process to print."""
    return int(os.environ.get("RANK", "0")) > 0
