"""What every benchmark shares: rows, timing in turns, the machine's name, and the baselines' code.

A row is a dict with ``work, baseline, seconds, baseline_seconds, ratio, floor_ratio, checked, device, dtype, shape``,
the quantiles ``p20, p80`` of ours, ``commit``, the versions and the machine. ``ratio`` is the baseline's seconds over
ours (medians), ``floor_ratio`` what that ratio would be if ours ran at its floor of flops or bytes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Row = dict[str, Any]
FIELDS = (
    "work",
    "baseline",
    "seconds",
    "baseline_seconds",
    "ratio",
    "floor_ratio",
    "checked",
    "device",
    "dtype",
    "shape",
)
_ROOT = Path(__file__).resolve().parents[2]


def baseline(name: str) -> ModuleType:
    """The module bench/baselines/<name>.py of the checkout; FileNotFoundError where only the package is installed."""
    path = _ROOT / "bench" / "baselines" / f"{name}.py"
    if not path.exists():
        raise FileNotFoundError(f"{path}: the baselines are part of the repository, not of the installed package")
    spec = importlib.util.spec_from_file_location(f"coachhook_baseline_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def once(work: Callable[[], Any]) -> float:
    """Seconds of one call, the GPU's queue included."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turns(candidates: Sequence[Callable[[], Any]], turns: int) -> list[list[float]]:
    """Seconds of each candidate's calls, taken in turns, so that what else the machine does slows all alike; every turn
    begins with another one."""
    taken: list[list[float]] = [[] for _ in candidates]
    for turn in range(turns):
        for place in range(len(candidates)):
            index = (turn + place) % len(candidates)
            taken[index].append(once(candidates[index]))
    return taken


def timed(candidates: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """`in_turns` for about `seconds`, at least five turns."""
    spent = sum(map(sum, in_turns(candidates, 2))) / 2
    return in_turns(candidates, max(5, min(300, int(seconds / spent))))


def quantile(taken: Sequence[float], at: float) -> float:
    return sorted(taken)[min(len(taken) - 1, int(at * len(taken)))]


def row(
    work: str,
    baseline: str,
    seconds: Sequence[float],
    baseline_seconds: Sequence[float],
    *,
    floor_seconds: float,
    checked: bool,
    dtype: torch.dtype,
    shape: str,
    **more: Any,
) -> Row:
    """One row from all timings of both sides; `more` is written as it is."""
    ours, theirs = statistics.median(seconds), statistics.median(baseline_seconds)
    return {
        "work": work,
        "baseline": baseline,
        "seconds": ours,
        "baseline_seconds": theirs,
        "ratio": theirs / ours,
        "floor_ratio": theirs / floor_seconds,
        "checked": checked,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "p20": quantile(seconds, 0.2),
        "p80": quantile(seconds, 0.8),
        "turns": len(seconds),
        "over_floor": ours / floor_seconds,
        **more,
    }


@functools.cache
def machine() -> dict[str, Any]:
    """Commit, versions, processor, threads and GPU: the same for all rows of a run."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"cpu x{torch.get_num_threads()}",
        "cpu": _cpu_name(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # before the run: other processes
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "coachhook_fast": _version("coachhook-fast"),
    }


def complete(rows: Iterable[Row]) -> list[Row]:
    """The rows with what `machine` knows and they do not say; ValueError if one lacks a field."""
    whole = [{**machine(), **found} for found in rows]
    for found in whole:
        if missing := [field for field in FIELDS if field not in found]:
            raise ValueError(f"row {found.get('work')!r} lacks {', '.join(missing)}")
    return whole


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """What $COACHHOOK_COMMIT says, for a copy with another history; else the checkout's commit, with + when files
    differ from it; None for an installed package."""
    if said := os.environ.get("COACHHOOK_COMMIT"):
        return said
    git = ["git", "-C", str(_ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
