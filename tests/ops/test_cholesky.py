"""The solver's operators against their plain definitions, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook_fast.ops import _library
from coachhook_fast.ops.cholesky import chol_downdate, chol_factor, chol_solve, chol_solve_update, chol_update
from coachhook_fast.ops.reference import cholesky as reference
from coachhook_fast.ops.reference.cholesky import pack, packed_size, unpack

SIZES = [
    (1, 1), (5, 3), (16, 10), (127, 4), (128, 10), (129, 17), (300, 1), (433, 40), (60, 200),
    (433, 2), (301, 3), (420, 4), (420, 5),  # around kNarrowKeys, over several panels
]  # fmt: skip
# Largest relative error, in units of the type's epsilon times the condition number (some hundreds here).
BOUND = {torch.float64: 1e-11, torch.float32: 3e-3}


def problem(d: int, n: int, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """(C, K), C of condition number about 1e2."""
    generator = torch.Generator().manual_seed(1000 * d + n)
    A = torch.randn(*batch, d, d, generator=generator, dtype=torch.float64) / d**0.5
    C = A @ A.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    K = torch.randn(*batch, d, n, generator=generator, dtype=torch.float64)
    return C.to(dtype), K.to(dtype)


def error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("d", "n"), SIZES)
def test_against_the_plain_definition(path: str, d: int, n: int, dtype: torch.dtype) -> None:
    C, K = problem(d, n, dtype)
    bound = BOUND[dtype]
    C64, K64 = C.double(), K.double()
    X_expected = torch.linalg.solve(C64 + K64 @ K64.T, K64)
    s_expected = (K64 * torch.linalg.solve(C64, K64)).sum(0)
    L = chol_factor(pack(C))
    assert error(unpack(L).double(), torch.linalg.cholesky(C64)) < bound
    before = L.clone()
    X, s = chol_solve(L, K)
    assert torch.equal(L, before)
    assert error(X, X_expected) < bound
    assert error(s, s_expected) < bound
    X, s = chol_solve_update(L, K)
    assert error(X, X_expected) < bound
    assert error(s, s_expected) < bound
    after = torch.linalg.cholesky(C64 + K64 @ K64.T)
    assert error(unpack(L).double(), after) < bound
    alone = before.clone()
    chol_update(alone, K)
    assert error(unpack(alone).double(), after) < bound
    chol_downdate(alone, K)
    assert error(unpack(alone).double(), torch.linalg.cholesky(C64)) < 100 * bound


@pytest.mark.parametrize("name", ["chol_factor", "chol_solve", "chol_update", "chol_solve_update", "chol_downdate"])
def test_reference_agrees_with_the_operator(name: str) -> None:
    C, K = problem(150, 7)
    L = torch.linalg.cholesky(C + 2 * K @ K.T)
    arguments = (pack(C),) if name == "chol_factor" else (pack(L), K)
    mine, plain = [a.clone() for a in arguments], [a.clone() for a in arguments]
    found = getattr(torch.ops.coachhook, name)(*mine)
    expected = getattr(reference, name)(*plain)
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(found, expected)


def test_layout() -> None:
    for d in (1, 2, 127, 128, 129, 300):
        matrix = torch.randn(2, d, d)
        packed = pack(matrix)
        assert packed.shape == (2, packed_size(d))
        assert torch.equal(unpack(packed), matrix.tril())
    with pytest.raises(ValueError, match=r"d \(d \+ 1\) / 2"):
        unpack(torch.zeros(5))


@pytest.mark.parametrize("batch", [(3,), (2, 2)])
def test_a_batch_of_factors_is_each_alone(path: str, batch: tuple[int, ...]) -> None:
    C, K = problem(200, 9, batch=batch)
    L = chol_factor(pack(C))
    alone = L.clone()
    X, s = chol_solve_update(L, K)
    assert X.shape == K.shape
    assert s.shape == (*batch, 9)
    for index in torch.cartesian_prod(*[torch.arange(size) for size in batch]).view(-1, len(batch)).tolist():
        item = tuple(index)
        factor = alone[item].clone()
        X_alone, s_alone = chol_solve_update(factor, K[item])
        assert torch.equal(factor, L[item])
        assert torch.equal(X_alone, X[item])
        assert torch.equal(s_alone, s[item])
    chol_downdate(L, K)
    torch.testing.assert_close(L, alone)


def test_threads_do_not_change_the_bits() -> None:
    C, K = problem(700, 12)
    start = chol_factor(pack(C))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            L = start.clone()
            X, s = chol_solve_update(L, K)
            found.append((L, X))
            torch.testing.assert_close(chol_solve(start, K), (X, s))  # n x n products of torch's own: to rounding
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_many_keys_are_refactorised(path: str) -> None:
    C, K = problem(140, 600)
    L = chol_factor(pack(C))
    X, s = chol_solve_update(L, K)
    after = C + K @ K.T
    assert error(unpack(L) @ unpack(L).T, after) < 1e-13
    assert error(X, torch.linalg.solve(after, K)) < 1e-11
    assert error(s, (K * torch.linalg.solve(C, K)).sum(0)) < 1e-11


@pytest.mark.parametrize("d", [33, 129, 256])
def test_more_keys_than_coordinates_keep_their_digits(path: str, d: int) -> None:
    """I + KᵀC⁻¹K of 2 d strong keys has condition 1e5 and more where C + KKᵀ has 1e2."""
    C, K = problem(d, 2 * d)
    K = 30 * K / K.std()
    L = chol_factor(pack(C)).float()
    kept = L.clone()
    exact = unpack(L.double())
    expected = torch.linalg.solve(exact @ exact.T + K @ K.T, K)
    assert error(chol_solve(L, K.float())[0].double(), expected) < 1e-4
    assert torch.equal(L, kept)
    assert error(chol_solve_update(L, K.float())[0].double(), expected) < 1e-4
    assert error(unpack(L.double()) @ unpack(L.double()).T, exact @ exact.T + K @ K.T) < 1e-5


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
def test_leverage_is_accurate_from_weak_to_strong(path: str, size: float) -> None:
    C, K = problem(200, 6)
    K = K * size
    L = chol_factor(pack(C))
    expected = (K * torch.linalg.solve(C, K)).sum(0)
    for s in (chol_solve(L, K)[1], chol_solve_update(L, K)[1]):
        assert float(((s - expected) / expected).abs().max()) < 1e-9


def test_strided_keys_and_keys_of_zero(path: str) -> None:
    C, K = problem(150, 8)
    L = chol_factor(pack(C))
    wide = torch.stack([K, K], -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(chol_solve(L, wide)[0], chol_solve(L, K)[0])
    before = L.clone()
    X, s = chol_solve_update(L, torch.zeros_like(K))
    assert torch.equal(L, before)
    assert not X.any()
    assert not s.any()


def test_no_keys(path: str) -> None:
    L = chol_factor(pack(problem(20, 1)[0]))
    before, none = L.clone(), torch.empty(20, 0, dtype=torch.float64)
    X, s = chol_solve_update(L, none)
    chol_update(L, none)
    chol_downdate(L, none)
    assert X.shape == (20, 0)
    assert s.shape == (0,)
    assert torch.equal(L, before)


def _with(tensor: Tensor, index: Any, value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


_L, _K = torch.ones(packed_size(6), dtype=torch.float64), torch.ones(6, 2, dtype=torch.float64)
REFUSED = [
    ("NaN in K", _L, _with(_K, (3, 1), float("nan")), ValueError, "K must be finite"),
    ("infinity in K", _L, _with(_K, (0, 0), float("inf")), ValueError, "K must be finite"),
    ("K whose squares overflow", _L, _K * 1e200, ValueError, "K must be finite"),
    ("K of another d", _L, torch.ones(5, 2, dtype=torch.float64), ValueError, r"K must be \[\*, d, n\].*\[5, 2\]"),
    ("K without n", _L, _K[:, 0], ValueError, r"K must be \[\*, d, n\].*\[6\]"),
    ("K of another batch", _L.expand(2, -1).contiguous(), _K, ValueError, r"K must be \[\*, d, n\]"),
    ("K of another type", _L, _K.float(), TypeError, "K must have L's type"),
    ("half precision", _L.half(), _K.half(), TypeError, "L must be float64 or float32"),
    ("no triangle", torch.ones(20, dtype=torch.float64), _K, ValueError, r"d \(d \+ 1\) / 2.*\[20\]"),
    ("strided L", torch.ones(2 * packed_size(6), dtype=torch.float64)[::2], _K, ValueError, "L must be contiguous"),
    ("negative diagonal", _with(_L, 2, -1.0), _K, ValueError, "L must have a positive diagonal, got -1"),
    ("zero diagonal", _with(_L, 5, 0.0), _K, ValueError, "L must have a positive diagonal, got 0"),
    ("NaN on the diagonal", _with(_L, 0, float("nan")), _K, ValueError, "L must have a positive diagonal, got nan"),
]


@pytest.mark.parametrize(("L", "K", "kind", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
@pytest.mark.parametrize("operator", [chol_solve, chol_update, chol_solve_update, chol_downdate])
def test_refused_with_nothing_changed(path: str, operator: Any, L: Tensor, K: Tensor, kind: type, message: str) -> None:
    L = L.clone() if L.is_contiguous() else L
    before = L.clone()
    with pytest.raises(kind, match=message):
        operator(L, K)
    assert torch.equal(L.nan_to_num(7.0), before.nan_to_num(7.0))


def test_factor_refuses_what_is_not_positive_definite(path: str) -> None:
    C, _ = problem(300, 1)
    C[200, 200] = -1.0
    with pytest.raises(ValueError, match="positive definite, but the leading minor of order 201"):
        chol_factor(pack(C))
    C[200, 200] = float("nan")
    with pytest.raises(ValueError, match="C must be finite"):
        chol_factor(pack(C))


def test_downdate_refuses_to_lose_definiteness(path: str) -> None:
    C, K = problem(300, 5)
    L = chol_factor(pack(C))
    before = L.clone()
    with pytest.raises(ValueError, match="must stay positive definite"):
        chol_downdate(L, 3 * K)
    both = torch.stack([L, L])
    with pytest.raises(ValueError, match="in factor 1"):
        chol_downdate(both, torch.stack([0.01 * K, 3 * K]))
    assert torch.equal(L, before)
    assert torch.equal(both, torch.stack([before, before]))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])  # on both sides of kNarrowKeys
@pytest.mark.parametrize("strength", [1e2, 1e4])
def test_downdate_of_a_strong_batch(path: str, n: int, strength: float) -> None:
    """Keys that dominate C: what is left has lost the digits that they covered, and no more."""
    C, K = problem(300, n)
    L = chol_factor(pack(C))
    before = unpack(L)
    chol_update(L, strength * K)
    chol_downdate(L, strength * K)
    covered = float(strength**2 * (K.T @ torch.linalg.solve(C, K)).diagonal().max())
    assert error(unpack(L) @ unpack(L).T, before @ before.T) < 4 * torch.finfo(torch.float64).eps * covered


@pytest.mark.parametrize("name", ["chol_factor", "chol_solve", "chol_update", "chol_solve_update", "chol_downdate"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_opcheck(name: str, batch: tuple[int, ...]) -> None:
    C, K = problem(40, 3, batch=batch)
    L = chol_factor(pack(C + 2 * K @ K.mT))
    arguments = (pack(C),) if name == "chol_factor" else (L, K)
    torch.library.opcheck(getattr(torch.ops.coachhook, name).default, arguments)


def test_compiles_without_a_break() -> None:
    def step(L: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
        X, s = torch.ops.coachhook.chol_solve_update(L, K * 1.0)
        return X * 2, s + 1

    C, K = problem(60, 4)
    L = chol_factor(pack(C))
    mine = L.clone()
    X, s = torch.compile(step, fullgraph=True, backend="aot_eager")(mine, K)
    X_eager, s_eager = step(L, K)
    torch.testing.assert_close((mine, X, s), (L, X_eager, s_eager))


def test_inference_mode_and_gradients_do_not_matter() -> None:
    C, K = problem(50, 4)
    L = chol_factor(pack(C))
    X, _ = chol_solve(L, K.clone().requires_grad_())
    with torch.inference_mode():
        assert torch.equal(chol_solve(L, K)[0], X)


def test_keys_beyond_all_digits_are_refused_with_nothing_changed() -> None:
    """Where C drowns in K K^T the device-generic path gives up, and refactorising says why."""
    C, K = problem(300, 3)
    K = torch.cat([K, K[:, :1] + 1e-3 * K[:, 1:2]], 1) * 1e8
    L = chol_factor(pack(C))
    before = L.clone()
    _library.EXTENSION.set_portable(True)  # type: ignore[union-attr]
    try:
        for operator in (chol_update, chol_solve_update):
            with pytest.raises(ValueError, match=r"C \+ K K\^T of factor 0 is not positive definite"):
                operator(L, K)
    finally:
        _library.EXTENSION.set_portable(False)  # type: ignore[union-attr]
    assert torch.equal(L, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("d", "n"), [(300, 7), (500, 20), (1000, 130), (2000, 100), (60, 200)])
def test_on_the_gpu(d: int, n: int, dtype: torch.dtype) -> None:
    C, K = problem(d, n, dtype)
    C64, K64 = C.double().cuda(), K.double().cuda()
    after = torch.linalg.cholesky(C64 + K64 @ K64.T)
    X_expected, s_expected = torch.cholesky_solve(K64, after), (K64 * torch.linalg.solve(C64, K64)).sum(0)
    L, K = chol_factor(pack(C).cuda()), K.cuda()
    before = L.clone()
    for X, s in (chol_solve(L, K), chol_solve_update(L, K)):
        assert error(X.double(), X_expected) < BOUND[dtype]
        assert error(s.double(), s_expected) < BOUND[dtype]
    assert error(unpack(L).double(), after) < BOUND[dtype]
    alone = before.clone()
    chol_update(alone, K)
    assert error(unpack(alone).double(), after) < BOUND[dtype]
    chol_downdate(alone, K)
    assert error(unpack(alone).double(), torch.linalg.cholesky(C64)) < 100 * BOUND[dtype]
    held = before.clone()
    with pytest.raises(ValueError, match="must stay positive definite"):
        chol_downdate(held, 1e3 * K)
    assert torch.equal(held, before)


@pytest.mark.gpu
@pytest.mark.parametrize("strength", [1.0, 1e4])
def test_a_strong_batch_on_the_gpu(strength: float) -> None:
    C, K = (a.cuda() for a in problem(700, 5))
    L = chol_factor(pack(C))
    K = torch.cat([K, K[:, :1] + 1e-3 * K[:, 1:2]], 1) * strength  # two keys that are almost one
    before = L.clone()
    chol_update(L, K)
    after = C + K @ K.T
    assert error(unpack(L) @ unpack(L).T, after) < 1e-14
    chol_downdate(L, K)
    covered = float((K * torch.linalg.solve(C, K)).sum(0).max())
    assert error(unpack(L) @ unpack(L).T, C) < 4 * torch.finfo(torch.float64).eps * max(covered, 100.0)
    assert not torch.equal(L, before)
