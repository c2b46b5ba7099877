"""The cache is a convenience: where it cannot be read or written, work goes on without it and says so once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from coachhook_fast import files
from coachhook_fast.models.loading import cache_dir


@contextmanager
def if_possible() -> Iterator[None]:
    """Writing to the cache, or removing from it, within: where that fails, a warning that is the same every time, so
    that it is shown once."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        warnings.warn(
            f"the cache {cache_dir()} cannot be written ({reason}): what is found is not kept for later runs; set "
            "COACHHOOK_CACHE to a folder that can be written",
            stacklevel=1,
        )


def is_there(path: Path) -> bool:
    """Whether the cache holds the file, and lets us see it."""
    try:
        return path.is_file()
    except OSError:
        return False


def cached_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file of the cache; none where there is no such file, or where it cannot be read,
    which a warning says: `what` are found anew then."""
    if not is_there(path):
        return {}
    try:
        return load(files.read_bytes(path, most=files.MOST_TENSORS))
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # a disk that was full
        warnings.warn(f"{path} cannot be read ({error}); its {what} are found anew", stacklevel=3)
        return {}


def cache_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the file; a reader sees the old one or the new one, whole."""
    with if_possible():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(dict(tensors), staging)
        staging.replace(path)
