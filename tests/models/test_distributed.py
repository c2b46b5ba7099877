"""Two gloo processes edit as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_edit import run
from safetensors.torch import load_file
from two_ranks import finish, start


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = start("distributed_edit.py", tmp_path)
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    run(tmp_path / "alone.safetensors")
    finish(processes)
    alone = load_file(tmp_path / "alone.safetensors")
    for rank in range(2):
        shared = load_file(tmp_path / f"rank{rank}.safetensors")
        assert shared["tokens"] == alone["tokens"]
        for name, value in alone.items():
            # The key sample is the same, the order of summation is not.
            torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-11, msg=f"{name} on rank {rank}")
