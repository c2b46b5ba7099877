"""The solver lets other threads run, and a signal stops it between panels with the factor as it was."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook_fast.ops import extension_available
from coachhook_fast.ops.cholesky import chol_downdate, chol_factor, chol_solve, chol_solve_update, chol_update
from coachhook_fast.ops.reference.cholesky import pack

pytestmark = pytest.mark.skipif(not extension_available(), reason="the extension is not built")


class Stop(Exception):
    pass


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises Stop from a signal handler, as Ctrl-C raises KeyboardInterrupt."""

    def handler(*_: Any) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", params=[(1500, 120), (2500, 3)], ids=["blocks", "narrow"])
def factors(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """(L, K) of two factors; K was added, so that it can be removed."""
    generator = torch.Generator().manual_seed(0)
    d, n = request.param
    A = torch.randn(2, d, 64, generator=generator, dtype=torch.float64)
    C = A @ A.mT + torch.eye(d, dtype=torch.float64)
    K = torch.randn(2, d, n, generator=generator, dtype=torch.float64)
    return chol_factor(pack(C + K @ K.mT)), K


def assert_stops(operator: Any, start: Tensor, K: Tensor) -> None:
    """Signals at different times: first factor, second factor, back substitution; a busy machine is early or late."""
    L = start.clone()
    operator(L, K)
    done = L.clone()
    tolerance = 1e-12 * float(start.abs().max())
    L.copy_(start)
    begin = time.perf_counter()
    operator(L, K)
    whole = time.perf_counter() - begin
    stopped = 0
    for attempt in range(100):
        L.copy_(start)
        try:
            with stopped_after((0.1 + 0.31 * attempt) % 0.9 * whole):
                operator(L, K)
        except Stop:
            # The signal may also come just after the operator ended: then the factor must be the finished one.
            if operator is chol_solve or not torch.equal(L, done):
                torch.testing.assert_close(L, start, rtol=0, atol=tolerance)
                stopped += 1
        if stopped == 5:
            return
    raise AssertionError(f"a signal stopped {stopped} of {attempt + 1} calls")


OPERATORS = [chol_update, chol_solve_update, chol_downdate, chol_solve]


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_signal_leaves_the_factor(path: str, operator: Any, factors: tuple[Tensor, Tensor]) -> None:
    assert_stops(operator, *factors)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_signal_leaves_the_factor_on_the_gpu(operator: Any, factors: tuple[Tensor, Tensor]) -> None:
    assert_stops(operator, *(tensor.cuda() for tensor in factors))


def test_other_threads_run_meanwhile(factors: tuple[Tensor, Tensor]) -> None:
    L, K = factors[0].clone(), factors[1]
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.01)
    before = ticks
    chol_update(L, K)
    during = ticks - before
    done.set()
    thread.join()
    assert during > (5 if K.shape[-1] > 100 else 0)
