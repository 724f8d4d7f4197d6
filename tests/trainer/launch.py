"""Two processes that train together, as torchrun would start them, and what each came to."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def start(module: str, *arguments: str, processes: int = 2) -> list[subprocess.Popen[str]]:
    """Start `python -m MODULE ARGUMENTS` once per process, with the environment of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {name: str(value) for name, value in (shared | own).items()},
            )
        )
    return started


def finish(started: list[subprocess.Popen[str]], *, within_s: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; a process that does not end is killed and fails the test."""
    try:
        said = [process.communicate(timeout=within_s) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *of_process) for process, of_process in zip(started, said, strict=True)]
