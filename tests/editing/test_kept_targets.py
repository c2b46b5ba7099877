"""Target values in the cache: only sound ones are taken, and a cache that cannot be written stops nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coachhook_fast.editing.targets.kept import discard_targets, read_targets, write_targets
from coachhook_fast.editing.targets.optimise import Target

WIDTH = 6


def target(seed: int) -> Target:
    return Target(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), 0.5, 7)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "targets" / "name.safetensors"
    assert read_targets(path, WIDTH, 3) == {}
    write_targets(path, {0: target(0), 2: target(2)})
    found = read_targets(path, WIDTH, 3)
    assert sorted(found) == [0, 2]
    assert torch.equal(found[2].value, target(2).value)
    assert (found[2].loss, found[2].steps) == (0.5, 7)
    discard_targets(path)
    discard_targets(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"value.1": torch.full((WIDTH,), float("nan"))},
        {"value.1": torch.full((WIDTH,), float("inf"))},
        {"value.1": torch.zeros(WIDTH + 1)},
        {"value.1": torch.zeros(WIDTH, dtype=torch.int64)},
        {"run.1": torch.tensor([float("nan"), 1.0])},
        {"run.1": torch.tensor([1.0])},
    ],
)
def test_unsound_targets_are_found_anew(tmp_path: Path, changes: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "name.safetensors"
    run = torch.tensor([0.5, 7.0], dtype=torch.float64)
    whole = {"value.0": target(0).value, "run.0": run, "value.1": target(1).value, "run.1": run.clone()}
    save_file({**whole, **changes}, path)
    with pytest.warns(UserWarning, match="1 targets that are none of this batch's"):
        assert sorted(read_targets(path, WIDTH, 2)) == [0]
    save_file({"value.9": target(0).value, "run.9": run, "value.x": target(0).value}, path)
    with pytest.warns(UserWarning, match="2 targets that are none"):
        assert read_targets(path, WIDTH, 2) == {}


def test_nan_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "name.safetensors"
    write_targets(path, {0: target(0), 1: Target(torch.full((WIDTH,), float("nan")), 0.5, 7)})
    assert sorted(read_targets(path, WIDTH, 2)) == [0]


@pytest.mark.parametrize("content", [b"", b"x" * 99, b"\x00" * 16])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "name.safetensors"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert read_targets(path, WIDTH, 2) == {}


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "file"))
    path = tmp_path / "file" / "targets" / "name.safetensors"
    messages = set()
    for seed in range(2):
        with pytest.warns(UserWarning, match="COACHHOOK_CACHE") as caught:
            write_targets(path, {0: target(seed)})
        messages |= {str(warning.message) for warning in caught}
    assert len(messages) == 1  # so that Python shows it once
    assert read_targets(path, WIDTH, 1) == {}
    discard_targets(path)
