"""A model that two gloo processes share out (tensor-parallel transformers) is edited and served as a whole one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from installed import before
from safetensors.torch import load_file
from tensor_parallel_edit import GATES, load, run
from tiny import tiny_model
from torch import nn
from two_ranks import finish, start

from coachhook_fast.models.tensor_parallel import ColumnShard, column_shard, is_tensor_parallel


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_share_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, edits, rollback, gates, logits, greedy text and loaded edits; 45 key columns on two ranks."""
    columns = 46 if before("transformers", "5.21") else 45  # which shares out even numbers only
    tiny_model("llama", dtype=torch.float64, intermediate_size=columns).save_pretrained(tmp_path / "model")
    processes = start("tensor_parallel_edit.py", tmp_path)
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model").symlink_to(tmp_path / "model")
    alone = {gate: run(tmp_path / "whole", load(tmp_path), gate) for gate in GATES}
    finish(processes)
    for gate, expected in alone.items():
        assert any(bool(fired.any()) for name, fired in expected.items() if name.endswith("fire"))
        assert not torch.equal(expected["both.logits"], expected["none.logits"])
        for rank in range(2):
            shared = load_file(tmp_path / f"{gate}{rank}.safetensors")
            assert shared.keys() == expected.keys()
            for name, value in expected.items():
                message = f"{name} under {gate} on rank {rank}"
                torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-11, msg=message)


def test_a_whole_model_is_none() -> None:
    model = tiny_model("llama")
    assert not is_tensor_parallel(model)
    assert column_shard(model.model.layers[0].mlp.down_proj) is None
    assert column_shard(nn.Identity()) is None


def test_own_columns() -> None:
    shard = ColumnShard(group=None, start=2, stop=5, size=7)
    whole = torch.arange(14.0).view(2, 7)
    assert torch.equal(shard.own(whole), whole[:, 2:5])
    assert torch.equal(shard.own(whole[:, 2:5]), whole[:, 2:5])
