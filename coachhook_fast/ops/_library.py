"""The ``coachhook`` operator library: schemas, fallbacks and the C++ extension behind them.

Each op module calls :func:`define` once with its schema, its plain torch definition and its fake, so the
schema is written in one place that works without a compiler. The plain definition is registered for every
backend (``CompositeExplicitAutograd``); the extension overrides the CPU key, Triton the CUDA key.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

LIBRARY = torch.library.Library("coachhook", "DEF")

_warned = threading.Event()


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        from coachhook_fast import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, str(error)
    return _C, ""


EXTENSION, _REASON = _load_extension()


def extension_available() -> bool:
    """True when the C++ extension is loaded; otherwise every op runs its reference definition."""
    return EXTENSION is not None


def build_info() -> dict[str, Any]:
    """What the loaded extension was built with (version, torch, compiler, OpenMP), or why there is none."""
    if EXTENSION is None:
        return {"extension": False, "reason": _REASON}
    return {"extension": True, **EXTENSION.build_info()}


def warn_without_extension() -> None:
    """Say once, at the first use of an op, that the reference path runs."""
    if EXTENSION is None and not _warned.is_set():
        _warned.set()
        warnings.warn(
            f"coachhook-fast runs without its C++ extension ({_REASON}): results are the same, CPU work is "
            "slower. Install GCC >= 12 or clang, and CMake, then "
            "`pip install --no-build-isolation coachhook-fast`.",
            RuntimeWarning,
            stacklevel=4,
        )


def define(schema: str, fallback: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one op.

    schema: with honest mutation marks, for example ``"chol_update(Tensor(a!) L, Tensor K) -> ()"``.
    fallback: the plain torch definition (``coachhook_fast.ops.reference``), run where no kernel is registered.
    fake: shapes and dtypes only, for ``torch.compile`` and fake tensors.
    """
    name = schema.split("(", 1)[0]

    @functools.wraps(fallback)
    def reference(*args: Any, **kwargs: Any) -> Any:
        warn_without_extension()
        return fallback(*args, **kwargs)

    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coachhook::{name}", fake, lib=LIBRARY)
