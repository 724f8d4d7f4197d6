"""What every test gets: no network, no more threads than cores, and the versions at the head of the run."""

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
LOOPBACK = {"127.0.0.1", "::1", "localhost", "", None}

# Before any test imports a hub client; `qforge` run as a subprocess inherits it.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_report_header() -> list[str]:
    """Versions and machine, so that a log says what it was run with."""
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    return [f"machine: {platform.machine()}, {os.cpu_count()} CPUs", "versions: " + ", ".join(versions)]


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
