"""Edits for programs that know nothing of gates: a LoRA adapter, or a plain checkpoint (docs/how-to/export.md)."""

from __future__ import annotations

from coachhook_fast.export.exporting import FORMATS, check_export, export_edits
from coachhook_fast.export.losses import ExportLosses, Limits, Served, TooMuchLostError, default_held_out

__all__ = [
    "FORMATS",
    "ExportLosses",
    "Limits",
    "Served",
    "TooMuchLostError",
    "check_export",
    "default_held_out",
    "export_edits",
]
