"""Without the extension, or with one for another torch: results are right, and one warning says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coachhook_fast.ops import _library

WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["coachhook_fast._C"] = None
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from coachhook_fast.editing.key_memory import KeyMemory
    from coachhook_fast.ops import build_info, extension_available
    memory = KeyMemory.from_second_moment(torch.eye(5), 2.0)
    X, s = memory.solve_update(torch.ones(5, 1))
    memory.downdate(torch.ones(5, 1))
assert not extension_available() and "reason" in build_info()
said = [str(w.message) for w in caught if "without its C++ extension" in str(w.message)]
assert len(said) == 1, said
assert "--no-build-isolation" in said[0] and "coachhook doctor" in said[0], said
assert torch.allclose(X, torch.full((5, 1), 1 / 7, dtype=X.dtype)) and torch.allclose(s, torch.tensor([2.5]).to(s))
assert torch.allclose(memory.matrix(), 2 * torch.eye(5, dtype=torch.float64))
"""


def test_runs_without_the_extension_and_says_so_once() -> None:
    folder = Path(__file__).resolve().parents[1]  # not the root: its `kernels` would shadow another package
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_extension_for_another_torch_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "_C.so"
    file.write_bytes(b"\x7fELF" + b"coachhook built for torch 2.9.1+cpu\0" + bytes(100))
    assert _library.built_for(file) == "2.9"
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert _library.other_torch(file) == "it was built for torch 2.9, and this is torch 2.10.0"
    monkeypatch.setattr(torch, "__version__", "2.9.0+cu130")
    assert _library.other_torch(file) == ""
    file.write_bytes(b"\x7fELF")  # of before: it does not say
    assert _library.other_torch(file) == ""


def test_the_loaded_extension_says_what_it_was_built_for() -> None:
    if _library.EXTENSION is None:
        pytest.skip("the extension is not built")
    assert _library.EXTENSION.__file__ is not None
    marked = _library.built_for(Path(_library.EXTENSION.__file__))
    assert marked in (None, ".".join(_library.build_info()["torch"].split(".")[:2]))
