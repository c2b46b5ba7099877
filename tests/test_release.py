"""One version everywhere, a section of the changelog for it, and a table of versions that is what the runs wrote."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import coachhook_fast

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "make" / f"{name}.py"))


def versions() -> list[tuple[str, str, str]]:
    check = script("check_release")
    return [one for one in check["sections"](check["read"]("CHANGELOG.md")) if one[0] != "Unreleased"]


def test_the_changelog_has_a_section_for_the_version() -> None:
    assert versions()[0][0] == coachhook_fast.__version__ == script("check_release")["package_version"]()


def test_every_version_has_left_edit_sets() -> None:
    for version, date, text in versions():
        assert list((ROOT / "tests/fixtures/edit_sets" / version).glob("*/edit_set.json")), version
        assert date
        assert text


def test_sections_are_read() -> None:
    sections = script("check_release")["sections"]
    text = "# Changelog\n\n## [Unreleased]\n\n- new\n\n## [0.2.0] - 2026-12-01\n\n### Added\n\n- b\n\n## [0.1.0]\n- a\n"
    assert sections(text) == [
        ("Unreleased", "", "- new"), ("0.2.0", "2026-12-01", "### Added\n\n- b"), ("0.1.0", "", "- a"),
    ]  # fmt: skip


def test_the_table_of_versions_is_what_the_runs_wrote() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert script("versions")["page"](text) == text, "make versions"


def test_a_run_is_recorded(request: pytest.FixtureRequest) -> None:
    from recorded_run import record

    found = record(request.config, {"passed": 3, "error": 1})
    assert '"passed": 3' in found
    assert '"failed": 1' in found
    assert "+" not in found  # torch's version without its local part, as in the table


def test_a_row_is_written_from_counts() -> None:
    result = script("versions")["result"]
    assert result({"passed": 9, "failed": 0, "skipped": 2}) == "9 passed, 2 skipped"
    assert result({"passed": 9, "failed": 1, "skipped": 2}) == "9 passed, 1 failed, 2 skipped"
