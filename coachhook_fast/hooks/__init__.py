"""Edits in a model: the hook layer, its gate and versions, what transformers' caches need, and loading an edit set."""

from __future__ import annotations

from coachhook_fast.hooks.hooks import Hooks, hooks_of
from coachhook_fast.hooks.shared_weights import shared_weight_copy

__all__ = ["Hooks", "hooks_of", "shared_weight_copy"]
