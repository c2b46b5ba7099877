"""No cache: everything works, and one warning says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import QUICK, edits, facts, model, out

from coachhook_fast.cli import main
from coachhook_fast.edits import store


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that cannot be made, not by root either."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "file" / "cache"))
    return tmp_path / "file" / "cache"


def warned(text: str, folder: Path) -> None:
    lines = [line for line in text.splitlines() if "COACHHOOK_CACHE" in line]
    assert len(lines) == 1, text
    assert f"coachhook: warning: the cache {folder} cannot be written (Not a directory)" in lines[0]


def test_eval(home: Path, no_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *model(home), *edits(home), *facts(home), "--metrics", "accuracy"]) == 0
    warned(capsys.readouterr().err, no_cache)


def test_stats(home: Path, no_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", *model(home), *QUICK]) == 0
    warned(capsys.readouterr().err, no_cache)


def test_edit(home: Path, no_cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["edit", *model(home), *facts(home), *QUICK, "--limit", "2", "--batch-size", "1"]
    assert main([*arguments, *out(tmp_path, "edits")]) == 0
    warned(capsys.readouterr().err, no_cache)
    assert store.load(tmp_path / "edits").num_edits == 2
