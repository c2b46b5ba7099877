"""KeyMemory: construction, what it refuses, its size, its file, and the memory that its work takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coachhook_fast.bench.solve import peak_extra_bytes
from coachhook_fast.editing.key_memory import KeyMemory, load_memories, save_memories
from coachhook_fast.ops import extension_available
from coachhook_fast.ops.reference.cholesky import packed_size


def moment(d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    A = torch.randn(d, d + 20, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    return (A @ A.T / (d + 20)).to(dtype)


def keys(d: int, n: int) -> Tensor:
    return torch.randn(d, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def identity(d: int) -> KeyMemory:
    """A large memory that costs nothing to make."""
    factor = torch.zeros(packed_size(d), dtype=torch.float64)
    memory = KeyMemory(factor)
    for first in range(0, d, 128):
        width = min(128, d - first)
        rows = torch.arange(width)
        factor[packed_size(d) - packed_size(d - first) + rows * (rows + 3) // 2] = 1.0
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [3, 200])
def test_holds_the_weighted_moment(d: int, dtype: torch.dtype) -> None:
    E = moment(d, dtype)
    memory = KeyMemory.from_second_moment(E, 400.0)
    torch.testing.assert_close(memory.matrix(), 400.0 * E.double())
    assert memory.dim == d
    assert memory.nbytes == 4 * d * d + 4 * d  # an fp32 C, and 4 d


def test_solve_update_downdate() -> None:
    E, K = moment(200), keys(200, 10)
    C = 5.0 * E
    memory = KeyMemory.from_second_moment(E, 5.0)
    X, s = memory.solve(K)
    torch.testing.assert_close(X, torch.linalg.solve(C + K @ K.T, K))
    torch.testing.assert_close(s, (K * torch.linalg.solve(C, K)).sum(0))
    torch.testing.assert_close(memory.matrix(), C)
    other = memory.clone()
    memory.update(K)
    torch.testing.assert_close(memory.matrix(), C + K @ K.T)
    torch.testing.assert_close(other.matrix(), C)
    X_too, s_too = other.solve_update(K)
    torch.testing.assert_close((X_too, s_too), (X, s))
    torch.testing.assert_close(other.factor, memory.factor)
    memory.downdate(K)
    torch.testing.assert_close(memory.matrix(), C)


def test_keys_of_any_floating_type() -> None:
    memory, K = KeyMemory.from_second_moment(moment(50), 1.0), keys(50, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        X, s = memory.solve(K.to(dtype))
        expected = memory.solve(K.to(dtype).double())
        assert X.dtype == s.dtype == torch.float64
        assert torch.equal(X, expected[0])


def test_refuses_bad_moments() -> None:
    E = moment(150)
    spoiled = E.clone()
    spoiled[140, 3] = spoiled[3, 140] = float("nan")
    lopsided = E.clone()
    lopsided[140, 3] += 1e-3
    indefinite = E - 2 * torch.eye(150, dtype=torch.float64)
    for bad, message in [
        (E[:100], r"moment must be \[d, d\], got \[100, 150\]"),
        (E.half(), "moment must be float32 or float64"),
        (spoiled, "moment must be finite"),
        (lopsided, "moment must be symmetric, but differs from its transpose by 0.001"),
        (indefinite, "moment must be positive definite.*leading minor"),
    ]:
        with pytest.raises(ValueError, match=message):
            KeyMemory.from_second_moment(bad, 1.0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight must be positive"):
            KeyMemory.from_second_moment(E, weight)


def test_refuses_bad_keys_with_nothing_changed() -> None:
    memory = KeyMemory.from_second_moment(moment(60), 1.0)
    before = memory.factor.clone()
    for bad, message in [
        (keys(61, 2), r"K must be \[60, n\], got \[61, 2\]"),
        (keys(60, 2)[:, 0], r"K must be \[60, n\], got \[60\]"),
        (torch.ones(60, 2, dtype=torch.int64), "K must be floating point"),
        (torch.full((60, 2), float("nan")), "K must be finite"),
    ]:
        for verb in (memory.solve, memory.update, memory.solve_update, memory.downdate):
            with pytest.raises(ValueError, match=message):
                verb(bad)
    with pytest.raises(ValueError, match="must stay positive definite"):
        memory.downdate(10 * keys(60, 2))
    assert torch.equal(memory.factor, before)


def test_refuses_bad_factors() -> None:
    for bad in (torch.ones(6), torch.ones(2, 6, dtype=torch.float64), torch.ones(12, dtype=torch.float64)[::2]):
        with pytest.raises(ValueError, match="factor must be"):
            KeyMemory(bad)
    with pytest.raises(ValueError, match=r"d \(d \+ 1\) / 2"):
        KeyMemory(torch.ones(7, dtype=torch.float64))
    with pytest.raises(ValueError, match="'factor'"):
        KeyMemory.from_state_dict({"L": torch.ones(6, dtype=torch.float64)})


def test_saves_and_loads(tmp_path: Path) -> None:
    memory = KeyMemory.from_second_moment(moment(150), 3.0)
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    loaded = KeyMemory.load(path)
    assert torch.equal(loaded.factor, memory.factor)
    assert torch.equal(KeyMemory.from_state_dict(memory.state_dict()).factor, memory.factor)
    loaded.update(keys(150, 4))  # private to this process, the file is as it was
    assert torch.equal(KeyMemory.load(path).factor, memory.factor)
    loaded.save(path)  # over the file that it is mapped from
    assert torch.equal(KeyMemory.load(path).factor, loaded.factor)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_several_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "memories.safetensors"
    memories = {str(layer): KeyMemory.from_second_moment(moment(40 + layer), 1.0) for layer in (3, 4)}
    save_memories(path, memories)
    loaded = load_memories(path)
    assert {name: memory.dim for name, memory in loaded.items()} == {"3": 43, "4": 44}
    assert torch.equal(loaded["4"].factor, memories["4"].factor)
    with pytest.raises(ValueError, match="must hold one key memory"):
        KeyMemory.load(path)


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"factor": torch.ones(6, dtype=torch.float64)}, path)
    with pytest.raises(ValueError, match="must be a key memory file with format"):
        KeyMemory.load(path)
    metadata = {"format": "coachhook-key-memory", "version": "1", "panel": "64"}
    save_file({"factor": torch.ones(6, dtype=torch.float64)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"panel '128'.*'64'"):
        KeyMemory.load(path)


def test_a_large_file_is_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    memory = identity(6000)
    memory.save(path)
    loaded: list[KeyMemory] = []
    extra = peak_extra_bytes(lambda: loaded.append(KeyMemory.load(path)))
    if extra is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert extra < memory.nbytes / 8
    assert loaded[0].dim == 6000


@pytest.mark.skipif(not extension_available(), reason="the reference path forms C")
@pytest.mark.parametrize("verb", ["solve", "update", "solve_update", "downdate"])
def test_work_takes_less_than_an_eighth_of_a_dense_c(verb: str) -> None:
    d = 6000
    memory, K = identity(d), 0.001 * keys(d, 32)
    memory.solve(K[:, :1])  # pages of code and libraries
    extra = peak_extra_bytes(lambda: getattr(memory, verb)(K))
    if extra is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert extra < d * d  # d * d / 8 numbers of 8 bytes


@pytest.mark.gpu
def test_on_and_off_the_gpu() -> None:
    memory, K = KeyMemory.from_second_moment(moment(100), 1.0), keys(100, 4)
    X, s = memory.solve(K)
    for factor_device, key_device in [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")]:
        moved = memory.to(factor_device)
        X_there, s_there = moved.solve(K.to(key_device))
        assert X_there.device.type == key_device
        torch.testing.assert_close((X_there.cpu(), s_there.cpu()), (X, s))
