"""coachhook-fast: consecutive batch editing of facts in language models, by gated hook layers (CoachHooK)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coachhook_fast.config import EditConfig
    from coachhook_fast.editing.editor import Editor
    from coachhook_fast.editing.outcomes import EditWarning, NotSaidError
    from coachhook_fast.editing.said import FactCheck
    from coachhook_fast.edits.edit_set import Batch, EditOutcome, EditSet, Removed
    from coachhook_fast.export.exporting import export_edits
    from coachhook_fast.hooks.layer import HookLinear
    from coachhook_fast.hooks.load_edits import load_edits
    from coachhook_fast.models.loading import load_model
    from coachhook_fast.request import EditRequest

__version__ = "0.1.0"  # pyproject.toml reads it here

# Imported when first asked for: `coachhook --help` then needs neither torch nor transformers.
_HOMES = {
    "Batch": "edits.edit_set",
    "EditConfig": "config",
    "EditOutcome": "edits.edit_set",
    "EditRequest": "request",
    "EditSet": "edits.edit_set",
    "EditWarning": "editing.outcomes",
    "Editor": "editing.editor",
    "FactCheck": "editing.said",
    "HookLinear": "hooks.layer",
    "NotSaidError": "editing.outcomes",
    "Removed": "edits.edit_set",
    "export_edits": "export.exporting",
    "load_edits": "hooks.load_edits",
    "load_model": "models.loading",
}

__all__ = [
    "Batch",
    "EditConfig",
    "EditOutcome",
    "EditRequest",
    "EditSet",
    "EditWarning",
    "Editor",
    "FactCheck",
    "HookLinear",
    "NotSaidError",
    "Removed",
    "export_edits",
    "load_edits",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
