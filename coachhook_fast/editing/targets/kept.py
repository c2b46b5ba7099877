"""The file of a batch's target values in the cache: read with every value checked, written where that is possible."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from coachhook_fast.editing.targets.optimise import Target
from coachhook_fast.models.caches import cache_tensors, cached_tensors, if_possible, is_there

_VALUE, _RUN = "value.", "run."


def read_targets(path: Path, width: int, count: int) -> dict[int, Target]:
    """Targets of a batch of `count` requests by position, of those that are [width] and finite; the others, and all of
    a file that cannot be read, are to be found anew, which a warning says."""
    tensors = cached_tensors(path, "targets")
    found: dict[int, Target] = {}
    for name in tensors:
        index = name.removeprefix(_VALUE)
        if name.startswith(_VALUE) and index.isdecimal() and int(index) < count:
            value, run = tensors[name], tensors.get(_RUN + index, torch.empty(0))
            if value.shape == (width,) and _is_finite(value) and run.shape == (2,) and _is_finite(run):
                loss, steps = run.tolist()
                found[int(index)] = Target(value, loss, int(steps))
    if lost := sum(name.startswith(_VALUE) for name in tensors) - len(found):
        warnings.warn(f"{path} holds {lost} targets that are none of this batch's; they are found anew", stacklevel=2)
    return found


def write_targets(path: Path, found: Mapping[int, Target]) -> None:
    """The finite ones of `found`; where the cache cannot be written, a warning."""
    kept = {index: target for index, target in found.items() if _is_finite(target.value) and math.isfinite(target.loss)}
    tensors = {f"{_VALUE}{index}": target.value.cpu().contiguous() for index, target in kept.items()}
    for index, target in kept.items():
        tensors[f"{_RUN}{index}"] = torch.tensor([target.loss, target.steps], dtype=torch.float64)
    cache_tensors(path, tensors)


def discard_targets(path: Path) -> None:
    """Removes the file, where there is one."""
    if is_there(path):
        with if_possible():
            path.unlink(missing_ok=True)


def _is_finite(values: torch.Tensor) -> bool:
    return values.is_floating_point() and bool(torch.isfinite(values).all())
