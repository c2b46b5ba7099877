"""coachhook-fast: consecutive batch editing of facts in language models, by gated hook layers (CoachHooK)."""

from __future__ import annotations

from coachhook_fast.config import EditConfig
from coachhook_fast.edit_set import Batch, EditOutcome, EditSet
from coachhook_fast.editor import Editor, EditWarning
from coachhook_fast.layer import HookLinear
from coachhook_fast.models import load_model
from coachhook_fast.request import EditRequest
from coachhook_fast.store import load_edits

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "EditConfig",
    "EditOutcome",
    "EditRequest",
    "EditSet",
    "EditWarning",
    "Editor",
    "HookLinear",
    "load_edits",
    "load_model",
]
