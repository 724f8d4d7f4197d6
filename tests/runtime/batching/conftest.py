"""The tiny language models of decoding's tests, behind a scheduler."""

from collections.abc import Callable, Iterator

import pytest

from runtime.batching.scheduler import Scheduler
from tests.runtime.batching.workshop import Workshop
from tests.runtime.decoding.conftest import family  # noqa: F401
from tests.runtime.decoding.family import Family

Open = Callable[..., Workshop]


@pytest.fixture
def workshop(family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:  # noqa: F811
    """Opens schedulers over the family, which end with the test; keywords: max_batch, max_wait_ms."""
    opened = list[Scheduler]()
    monkeypatch.setattr(family.decoder, "start", family.decoder.start)  # what tests put there goes again

    def open_one(max_batch: int = 8, max_wait_ms: float = 0.0) -> Workshop:
        made = Workshop(family, max_batch, max_wait_ms)
        opened.append(made.scheduler)
        return made

    yield open_one
    for scheduler in opened:
        scheduler.close()
