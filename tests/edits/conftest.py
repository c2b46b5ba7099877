"""A saved edit set to damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_cases import edit_set

from coachhook_fast.edits import store


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    store.save(edit_set(2), tmp_path / "edits")
    return tmp_path / "edits"
