"""Which versions of other packages are installed: some tests are of what came with one of them."""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version


def before(package: str, version: str) -> bool:
    """Whether the installed `package` is older than `version`."""
    return Version(importlib.metadata.version(package)) < Version(version)
