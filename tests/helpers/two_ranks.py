"""Runs a script on two gloo processes under torchrun's variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def start(script: str, folder: Path) -> list[subprocess.Popen[str]]:
    """`python SCRIPT FOLDER` on ranks 0 and 1, each with a cache of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "PYTHONPATH": str(HERE), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "COACHHOOK_CACHE": str(folder / f"cache{rank}"),
        }  # fmt: skip
        command = [sys.executable, str(HERE / script), str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Waits for them; AssertionError with what a failed one wrote."""
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in processes:  # the others of a failed one wait for it
            process.kill()
