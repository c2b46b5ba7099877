"""The cache is a convenience: where it cannot be read or written, work goes on without it and says so once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

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
