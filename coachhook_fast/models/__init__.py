"""A base model as it is: loading it, where its family keeps what, on which devices and ranks its parts are."""

from __future__ import annotations

from coachhook_fast.models.loading import load_model

__all__ = ["load_model"]
