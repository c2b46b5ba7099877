"""The ``coachhook`` operator library: schemas, fallbacks and the C++ extension behind them.

Each op module calls :func:`define` once with its schema, its plain torch definition and its fake, so the
schema is written in one place that works without a compiler. The plain definition is registered for every
backend (``CompositeExplicitAutograd``); the extension overrides the CPU key, Triton the CUDA key.
"""

from __future__ import annotations

import importlib.util
import mmap
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

LIBRARY = torch.library.Library("coachhook", "DEF")


def built_for(file: Path) -> str | None:
    """The minor version of torch that an extension was built for, such as "2.13"; None where the file does not say."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"coachhook built for torch (\d+\.\d+)", content)
        return found[1].decode() if found else None


def other_torch(file: Path) -> str:
    """Why an extension does not go with this torch, or "". Asked before it is loaded: a library of another minor
    version may find every symbol and mean something else by it."""
    wanted, here = built_for(file), ".".join(torch.__version__.split(".")[:2])
    if wanted in (None, here):
        return ""
    return f"it was built for torch {wanted}, and this is torch {torch.__version__}"


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        found = importlib.util.find_spec("coachhook_fast._C")
        if found is not None and found.origin and (reason := other_torch(Path(found.origin))):
            return None, reason
        from coachhook_fast import _C  # type: ignore[attr-defined]
    except (ImportError, OSError, ValueError) as error:  # ValueError: an empty file, or a module without a spec
        return None, str(error)
    return _C, ""


EXTENSION, _REASON = _load_extension()
if EXTENSION is None:  # once for each process: a module is run once
    warnings.warn(
        f"coachhook-fast runs without its C++ extension ({_REASON}): results are the same, CPU work is slower. Install "
        f"a wheel for torch {'.'.join(torch.__version__.split('.')[:2])}, or build it: GCC >= 12 or clang, CMake >= "
        "3.19, `pip install pybind11 ninja`, then `pip install --no-build-isolation coachhook-fast`. `coachhook "
        "doctor` says what is here.",
        RuntimeWarning,
        stacklevel=2,
    )


def extension_available() -> bool:
    """True when the C++ extension is loaded; otherwise every op runs its reference definition."""
    return EXTENSION is not None


def build_info() -> dict[str, Any]:
    """What the loaded extension was built with (version, torch, compiler, OpenMP), or why there is none."""
    if EXTENSION is None:
        return {"extension": False, "reason": _REASON}
    return {"extension": True, **EXTENSION.build_info()}


def define(schema: str, fallback: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one op.

    schema: with honest mutation marks, for example ``"chol_update(Tensor(a!) L, Tensor K) -> ()"``.
    fallback: the plain torch definition (``coachhook_fast.ops.reference``), run where no kernel is registered.
    fake: shapes and dtypes only, for ``torch.compile`` and fake tensors.
    """
    name = schema.split("(", 1)[0]

    LIBRARY.define(schema)
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coachhook::{name}", fake, lib=LIBRARY)
