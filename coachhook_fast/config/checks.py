"""The checks that every group of settings makes of its values."""

from __future__ import annotations

import math
from typing import Any


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, integer: bool = False
) -> None:
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above}, got {value}")


def check_optional(name: str, value: Any, **limits: Any) -> None:
    """`check_number`, or None."""
    if value is not None:
        check_number(name, value, **limits)


def check_flag(name: str, value: Any) -> None:
    """TypeError unless `value` is true, false or None."""
    if not isinstance(value, (bool, type(None))):
        raise TypeError(f"{name} must be true, false or null, got {value!r}")


def as_tuple(settings: Any, name: str) -> None:
    """A list, as YAML and JSON give it, becomes a tuple; TypeError for anything else but None."""
    value = getattr(settings, name)
    if isinstance(value, list):
        object.__setattr__(settings, name, tuple(value))
    elif not isinstance(value, tuple) and value is not None:
        raise TypeError(f"{name} must be a list, got {value!r}")
