"""Two gloo processes edit as one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_edit import run
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


@pytest.mark.timeout(300)
def test_two_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "PYTHONPATH": str(HERE), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "COACHHOOK_CACHE": str(tmp_path / f"cache{rank}"),
        }  # fmt: skip
        command = [sys.executable, str(HERE / "distributed_edit.py"), str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    run(tmp_path / "alone.safetensors")
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    alone = load_file(tmp_path / "alone.safetensors")
    for rank in range(2):
        shared = load_file(tmp_path / f"rank{rank}.safetensors")
        assert shared["tokens"] == alone["tokens"]
        for name, value in alone.items():
            # The key sample is the same, the order of summation is not.
            torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-11, msg=f"{name} on rank {rank}")
