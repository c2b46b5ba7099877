"""LowRankDelta against the accumulated dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coachhook_fast.edits.delta import LowRankDelta

M, D = 48, 96


def batch(generator: torch.Generator, n: int, m: int = M, d: int = D) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(m, n, generator=generator, dtype=torch.float64),
        torch.randn(d, n, generator=generator, dtype=torch.float64),
    )


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def empty(m: int = M, d: int = D) -> LowRankDelta:
    return LowRankDelta.zeros(m, d, dtype=torch.float64)


def assert_orthonormal(delta: LowRankDelta) -> None:
    assert delta.U is not None
    torch.testing.assert_close(delta.U.T @ delta.U, torch.eye(delta.rank, dtype=torch.float64), atol=1e-13, rtol=0)


def test_three_hundred_batches_equal_the_dense_sum(generator: torch.Generator) -> None:
    m, d = 330, 700
    delta, dense = empty(m, d), torch.zeros(m, d, dtype=torch.float64)
    for step in range(300):
        R, X = batch(generator, 1 + step % 3, m, d)
        R *= 10.0 ** (step % 7 - 3)  # batches of very different sizes
        X /= 10.0 ** (step % 7 - 3)
        delta, dense = delta.append(R, X), dense + R @ X.T
        if not delta.is_dense:
            assert delta.rank <= min(sum(1 + i % 3 for i in range(step + 1)), m)
    assert (delta.dense() - dense).abs().max() <= 1e-10
    assert delta.nbytes <= dense.nbytes


def test_three_hundred_batches_stay_orthonormal(generator: torch.Generator) -> None:
    m, d = 300, 1000
    basis = torch.linalg.qr(torch.randn(m, 150, generator=generator, dtype=torch.float64))[0]
    delta, dense = empty(m, d), torch.zeros(m, d, dtype=torch.float64)
    for step in range(300):  # residuals from a space of 150 directions: half of them bring nothing new
        mixture = 0.02 * torch.randn(150, 1, generator=generator, dtype=torch.float64)
        mixture[step % 150] += 1.0
        R = basis @ mixture
        X = torch.randn(d, 1, generator=generator, dtype=torch.float64)
        delta, dense = delta.append(R, X), dense.addmm_(R, X.T)
    assert delta.rank == 150
    assert_orthonormal(delta)
    assert (delta.dense() - dense).abs().max() <= 1e-10 * dense.abs().max()


def test_dependent_and_zero_columns_bring_no_rank(generator: torch.Generator) -> None:
    R, X = batch(generator, 4)
    R[:, 1] = 2 * R[:, 0]
    R[:, 2] = 0
    delta = empty().append(R, X)
    assert delta.rank == 2
    assert_orthonormal(delta)
    torch.testing.assert_close(delta.dense(), R @ X.T)
    again = delta.append(R[:, :2], X[:, :2])
    assert again.rank == 2
    assert empty().append(torch.zeros_like(R), X).rank == 0


def test_a_tiny_residual_with_a_large_key_is_kept(generator: torch.Generator) -> None:
    R, X = batch(generator, 2)
    R[:, 1] *= 1e-20
    X[:, 1] *= 1e20
    delta = empty().append(R, X)
    assert delta.rank == 2
    torch.testing.assert_close(delta.dense(), R @ X.T)


def test_almost_parallel_residuals_stay_orthonormal(generator: torch.Generator) -> None:
    R, X = batch(generator, 3)
    R[:, 1] = R[:, 0] + 1e-10 * R[:, 1]
    delta = empty().append(R[:, :1], X[:, :1]).append(R[:, 1:], X[:, 1:])
    assert_orthonormal(delta)
    torch.testing.assert_close(delta.dense(), R @ X.T, atol=1e-12, rtol=1e-12)


def test_batches_leave_in_any_order(generator: torch.Generator) -> None:
    batches = [batch(generator, n) for n in (3, 1, 4, 2)]
    delta, dense = empty(), torch.zeros(M, D, dtype=torch.float64)
    for R, X in batches:
        delta, dense = delta.append(R, X), dense + R @ X.T
    for at in (1, 3, 0, 2):
        R, X = batches[at]
        before = delta.rank
        delta, dense = delta.remove(R, X), dense - R @ X.T
        assert delta.rank == before - R.shape[1]
        assert_orthonormal(delta)
        assert (delta.dense() - dense).abs().max() <= 1e-12
    assert delta.rank == 0


def test_dense_where_the_factors_would_be_larger(generator: torch.Generator) -> None:
    R, X = batch(generator, 31)
    assert not empty().append(R, X).is_dense  # 31 * 144 < 48 * 96
    R, X = batch(generator, 40)
    delta = empty().append(R, X)
    assert delta.is_dense
    assert delta.nbytes == M * D * 8
    torch.testing.assert_close(delta.dense(), R @ X.T)
    more, Y = batch(generator, 2)
    torch.testing.assert_close(delta.append(more, Y).remove(R, X).dense(), more @ Y.T)
    smaller, bound = delta.append(more, Y).remove(R, X).truncate(tolerance=1e-9)
    assert smaller.rank == 2
    assert bound <= 1e-9


def test_truncate_reports_a_bound_that_holds(generator: torch.Generator) -> None:
    R, X = batch(generator, 12)
    delta = empty().append(R, X)
    for kept in (0, 5, 11, 12, 20):
        smaller, bound = delta.truncate(rank=kept)
        assert smaller.rank == min(kept, 12)
        error = float(torch.linalg.matrix_norm(delta.dense() - smaller.dense(), 2))
        assert error <= bound
        assert bound <= error + 1e-9
    exact = torch.linalg.svdvals(delta.dense())
    smaller, bound = delta.truncate(tolerance=float(exact[7]) * 1.001)
    assert smaller.rank == 7
    assert bound <= float(exact[7]) * 1.001


def test_norms_and_casts(generator: torch.Generator) -> None:
    R, X = batch(generator, 5)
    delta = empty().append(R, X)
    keys = torch.randn(2, 7, D, generator=generator, dtype=torch.float64)
    expected = (keys @ (R @ X.T).T).norm(dim=-1)
    torch.testing.assert_close(delta.norms(keys), expected)
    half = delta.to(dtype=torch.bfloat16)
    assert half.norms(keys.to(torch.bfloat16)).dtype == torch.float32
    torch.testing.assert_close(half.norms(keys.to(torch.bfloat16)).double(), expected, rtol=2e-2, atol=0)
    assert delta.to(dtype=torch.float64) is delta
    restored = LowRankDelta.from_state_dict(delta.state_dict())
    assert torch.equal(restored.dense(), delta.dense())


def test_a_delta_never_changes(generator: torch.Generator) -> None:
    R, X = batch(generator, 5)
    delta = empty().append(R, X)
    before = delta.dense().clone()
    delta.append(*batch(generator, 3)).remove(R, X).truncate(rank=1)
    assert torch.equal(delta.dense(), before)


def test_errors_name_the_argument(generator: torch.Generator) -> None:
    R, X = batch(generator, 2)
    delta = empty()
    with pytest.raises(ValueError, match=r"R must be \[48, n\]"):
        delta.append(R[1:], X)
    with pytest.raises(ValueError, match=r"X must be \[96, 2\]"):
        delta.append(R, X[:, :1])
    with pytest.raises(ValueError, match="R must be finite"):
        delta.append(R * float("nan"), X)
    with pytest.raises(ValueError, match="X must be finite"):
        delta.remove(R, X * float("inf"))
    with pytest.raises(ValueError, match="exactly one of rank and tolerance"):
        delta.truncate()
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        delta.truncate(tolerance=-1.0)
    with pytest.raises(ValueError, match="must be positive"):
        LowRankDelta.zeros(0, 4)
    with pytest.raises(ValueError, match="keys must be"):
        delta.norms(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="must have the key B"):
        LowRankDelta.from_state_dict({"A": R})
    with pytest.raises(ValueError, match="to match B"):
        LowRankDelta(R, X)
