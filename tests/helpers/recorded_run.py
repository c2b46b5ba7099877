"""What a run of the tests writes about itself, for the table of docs/compatibility.md (make/versions.py)."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform

import pytest

PACKAGES = ("torch", "triton", "numpy", "transformers", "vllm")


def version(package: str) -> str:
    """Without the local part, such as +cpu; "" where it is not installed. vLLM's CPU build has a name of its own."""
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def record(config: pytest.Config, counts: dict[str, int]) -> str:
    """One row as JSON."""
    found = {name: version(name) for name in PACKAGES}
    tier = "quick" if "not slow" in config.option.markexpr else "whole"
    row: dict[str, object] = {"python": ".".join(platform.python_version_tuple()[:2]), **found}
    row["tests"] = f"{' '.join(config.args)}, {tier}"
    row |= {name: counts.get(name, 0) for name in ("passed", "skipped")}
    row["failed"] = counts.get("failed", 0) + counts.get("error", 0)
    row["date"] = datetime.date.today().isoformat()
    return json.dumps(row, indent=1) + "\n"
