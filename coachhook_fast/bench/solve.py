"""`coachhook bench solve`: the key memory against the published dense solve.

Every row: X is compared with the baseline's and the factor with C + K Kᵀ before anything is timed. The floor is the
larger of the flops 2 d² n (solve) + 4 d² n (update) at this machine's measured dgemm rate, and the bytes of the factor
read twice and written once at its measured memory rate (docs/solver.md).
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.bench import rows as common
from coachhook_fast.editing.key_memory import KeyMemory

FIGURES = ((6400, 10), (6400, 100), (16384, 100))  # d, n
SCALING = ((1536, 3072, 6400), (1, 10, 32, 100, 320))
GPU_SCALING = ((1536, 6400), (1, 32, 320))
TOLERANCE = 1e-9  # of X, relative; C's condition number is about 1e3


def problem(d: int, n: int, device: str = "cpu", samples: int = 512) -> tuple[Tensor, Tensor]:
    """(C, K): a key covariance of a low-rank part and a floor, as real keys have, and keys of its kind. fp64."""
    generator = torch.Generator().manual_seed(d + n)
    A = torch.randn(d, samples, dtype=torch.float64, generator=generator).to(device)
    C = torch.mm(A, A.T).div_(samples)
    C.diagonal().add_(1.0)
    return C, torch.randn(d, n, dtype=torch.float64, generator=generator).to(device)


def with_rates(work: Callable[[], Any], turns: int, device: str) -> tuple[list[float], float, float]:
    """Seconds of `work`, and flops and bytes a second of an fp64 product and of reading and writing 256 MiB.

    The three take turns and the rates are medians: what a shared machine takes from one, it takes from all.
    """
    A = torch.randn(2048, 2048, dtype=torch.float64, device=device)
    x = torch.ones(1 << 25, dtype=torch.float64, device=device)
    work()
    taken, product, stream = common.in_turns([work, lambda: A @ A, lambda: x.mul_(1.0)], turns)
    return taken, 2.0 * 2048**3 / statistics.median(product), 2.0 * x.nbytes / statistics.median(stream)


def floors(d: int, n: int, flop_rate: float, byte_rate: float) -> tuple[float, float]:
    """Seconds that solve and update take at least: of the plain way's flops, and of the bytes of the packed factor."""
    return 6.0 * d * d * n / flop_rate, 3.0 * 4.0 * d * (d + 1) / byte_rate


def peak_extra_bytes(work: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes of memory that `work` holds at its highest beyond what was there before; None where it cannot be told."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or freed pages are used again, and nothing shows
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _checked(memory: KeyMemory, C: Tensor, K: Tensor, X: Tensor) -> bool:
    """Ours against the baseline's X, and the updated factor against C + K Kᵀ along random directions."""
    ours = memory.clone()
    mine, _ = ours.solve_update(K)
    close = float((mine - X).norm() / X.norm()) < TOLERANCE
    probe = torch.randn(C.shape[0], 4, dtype=C.dtype, device=C.device)
    # (C + K K^T)^-1 applied by the updated memory to vectors of its own: solve's X = (C' + k k^T)^-1 k
    after = C @ probe + K @ (K.T @ probe)
    Y, _ = ours.solve(after)
    S = torch.eye(4, dtype=C.dtype, device=C.device) + probe.T @ after  # Woodbury with C'^-1 (C' probe) = probe
    expected = torch.linalg.solve(S.T, probe.T).T
    return close and float((Y - expected).norm() / expected.norm()) < TOLERANCE


def solve_update_row(d: int, n: int, turns: tuple[int, int], device: str, *, measure_memory: bool) -> common.Row:
    """Ours and the published solve, `turns` times each (ours, baseline)."""
    published = common.baseline("published_solve")
    C, K = problem(d, n, device)
    memory = KeyMemory.from_second_moment(C, 1.0)
    X = torch.empty_like(K)
    # the timed runs change both, so each run sees a C with one batch more: the work is the same
    first = common.once(lambda: X.copy_(published.solve_update(C, K)))
    C -= K @ K.T
    checked = _checked(memory, C, K, X)
    taken, *rates = with_rates(lambda: memory.solve_update(K), turns[0], device)
    # a GPU's first call loads its libraries, and is none of the times
    theirs = [first] if device == "cpu" else []
    theirs += common.in_turns([lambda: published.solve_update(C, K)], turns[1] - len(theirs))[0]
    flop, byte = floors(d, n, *rates)
    ours_extra = peak_extra_bytes(lambda: memory.solve_update(K), device)
    theirs_extra = peak_extra_bytes(lambda: published.solve_update(C, K), device) if measure_memory else None
    return common.row(
        "solve and update",
        "torch.linalg.solve(C + K K^T, K); C += K K^T",
        taken,
        theirs,
        floor_seconds=max(flop, byte),
        checked=checked,
        dtype=torch.float64,
        shape=f"d {d}, n {n}",
        d=d,
        n=n,
        flop_floor_seconds=flop,
        byte_floor_seconds=byte,
        dgemm_gflops=rates[0] / 1e9,
        memory_gb_s=rates[1] / 1e9,
        extra_bytes=ours_extra,
        baseline_extra_bytes=theirs_extra,
        extra_bytes_limit=d * d,  # d*d/8 numbers of 8 bytes
        factor_bytes=memory.nbytes,
    )


def downdate_row(d: int, n: int, turns: tuple[int, int], device: str) -> common.Row:
    """Removing a batch, against refactorising what is left."""
    published = common.baseline("published_solve")
    C, K = problem(d, n, device)
    memory = KeyMemory.from_second_moment(C, 1.0)
    kept = memory.factor.clone()
    memory.update(K)
    memory.downdate(K)
    checked = float((memory.factor - kept).norm() / kept.norm()) < TOLERANCE
    memory.update(K.repeat(1, turns[0] + 1))  # as often as it is removed
    taken, *rates = with_rates(lambda: memory.downdate(K), turns[0], device)
    C += K @ K.T
    if device != "cpu":
        published.refactorise(C, K)
    theirs = common.in_turns([lambda: published.refactorise(C, K)], turns[1])[0]
    flop, byte = floors(d, n, *rates)
    return common.row(
        "remove a batch",
        "torch.linalg.cholesky(C - K K^T)",
        taken,
        theirs,
        floor_seconds=max(flop * 5 / 6, byte),  # d^2 n to look ahead, 4 d^2 n to rotate; the same three passes
        checked=checked,
        dtype=torch.float64,
        shape=f"d {d}, n {n}",
        d=d,
        n=n,
    )


def run(
    figures: Sequence[tuple[int, int]] = FIGURES,
    scaling: tuple[Sequence[int], Sequence[int]] | None = None,
    turns: tuple[int, int] = (7, 3),
) -> list[common.Row]:
    """The issue's figures, a downdate, and the scaling in d and n (ours many times, the baseline a few)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device != "cpu"
    scaling = scaling or (GPU_SCALING if on_gpu else SCALING)
    rows = []
    done = set()
    for d, n in [*figures, *((d, n) for d in scaling[0] for n in scaling[1])]:
        if (d, n) in done:
            continue
        done.add((d, n))
        in_full = on_gpu or ((d, n) in figures and d <= 6400)
        often = (turns[0], turns[1] if in_full else 1)
        rows.append(solve_update_row(d, n, often, device, measure_memory=in_full))
    if figures:
        d, n = figures[0]
        rows.append(downdate_row(d, n, (turns[0], turns[1] if on_gpu else 1), device))
    return rows


def plot(rows: Sequence[common.Row], path: str | Path) -> None:
    """Seconds of solve and update over n, a curve a d, with its floor; needs the extra [plot]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    found = [row for row in rows if row["work"] == "solve and update"]
    for index, d in enumerate(sorted({row["d"] for row in found})):
        curve = sorted((row for row in found if row["d"] == d), key=lambda row: row["n"])
        n = [row["n"] for row in curve]
        color = f"C{index}"
        left.loglog(n, [row["baseline_seconds"] for row in curve], "s:", color=color, alpha=0.5)
        left.loglog(n, [row["seconds"] for row in curve], "o-", color=color, label=f"d {d}")
        floor = [max(row["flop_floor_seconds"], row["byte_floor_seconds"]) for row in curve]
        left.loglog(n, floor, "--", color=color, alpha=0.7)
        right.semilogx(n, [row["over_floor"] for row in curve], "o-", color=color, label=f"d {d}")
    left.set(xlabel="keys a batch, n", ylabel="seconds", title="solve and update (dashed: floor; dotted: LU)")
    right.axhline(2.5, color="gray", linewidth=1)
    right.set(xlabel="keys a batch, n", ylabel="times the floor", ylim=(0, None), title="distance to the floor")
    left.legend()
    right.legend()
    figure.suptitle(f"{found[0]['cpu']}, {found[0]['device']}, fp64, commit {found[0]['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
