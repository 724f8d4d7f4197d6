"""What every test gets: no network, versions at the head of the run, and a place in the order of several workers."""

import gc
import importlib.metadata
import os
import platform
import socket
from typing import Any

import pytest

LIBRARIES = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "nncf",
    "numpy",
    "pillow",
    "tokenizers",
    "pydantic",
    "typer",
)
WORKER = "PYTEST_XDIST_WORKER" in os.environ
TOGETHER = (
    "export",
    "benchmarks",
    "test_readme.py",
    "trainer/convert",
    "qforge/test_processes.py",
    "qforge/test_interrupted_run.py",
    "trainer/test_distributed.py",
)
"""Handed to one worker whole (`make test` has two), the longest first: a folder's tests share what is slow to make."""
LOOPBACK = {"127.0.0.1", "::1", "localhost", "", None}

# Before any test imports a hub client or torch; `qforge` run as a subprocess inherits both.
os.environ["HF_HUB_OFFLINE"] = "1"
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other workers have the other cores


def pytest_report_header() -> list[str]:
    """Versions and machine, so that a log says what it was run with."""
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    return [f"machine: {platform.machine()}, {os.cpu_count()} CPUs", "versions: " + ", ".join(versions)]


def group(nodeid: str) -> str:
    """The tests that go to one worker: a row of `TOGETHER`, or else a file."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next((place for place in TOGETHER if file.startswith(place)), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers are handed what comes first, first."""
    if WORKER:
        items.sort(key=lambda item: (*TOGETHER, group(item.nodeid)).index(group(item.nodeid)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector of cycles need not look through it again, at every trace anew."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups to workers, in order; xdist 3.8's own `--dist loadgroup` sees no groups under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may talk to this machine only."""
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def refuse(host: object) -> None:
        if host not in LOOPBACK:
            raise RuntimeError(f"a test tried to reach {host}; tests are offline")

    def only_loopback(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return resolve(host, *args, **kwargs)

    def only_loopback_connect(self: socket.socket, address: Any) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            refuse(address[0])
        connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
    monkeypatch.setattr(socket.socket, "connect", only_loopback_connect)
