"""What must hold before a version is released: check_release.py. Says all that does not, and fails.

Version: `__version__`, CITATION.cff and the newest section of CHANGELOG.md, which has a date. Changelog: nothing is
left under Unreleased. Saved edit sets: every version of the changelog has left some for the tests. Git: nothing
uncommitted, and the version has no tag yet.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def package_version() -> str:
    """Read, not imported: the package may not be installed where a release is checked."""
    return found(r'^__version__ = "([^"]+)"', read("coachhook_fast/__init__.py"))


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.M)
    return match[1] if match else ""


def sections(changelog: str) -> list[tuple[str, str, str]]:
    """(version, date, text) of each section, newest first; Unreleased is a version without a date."""
    parts = re.split(r"^## \[([^]]+)\](?: - (\S+))?$", changelog, flags=re.M)[1:]
    return [(parts[n], parts[n + 1] or "", parts[n + 2].strip()) for n in range(0, len(parts), 3)]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    version = package_version()
    first, *others = sections(read("CHANGELOG.md"))
    released = [first, *others] if first[0] != "Unreleased" else others
    wrong = []
    if first[0] == "Unreleased" and first[2]:
        wrong.append(f"CHANGELOG.md: {first[2].count(chr(10) + '- ')} entries are under Unreleased")
    if released[0][0] != version:
        wrong.append(f"CHANGELOG.md: the newest section is {released[0][0]}, __version__ is {version}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", released[0][1]):
        wrong.append(f"CHANGELOG.md: the section {released[0][0]} has no date")
    if (cited := found(r"^version: (\S+)$", read("CITATION.cff"))) != version:
        wrong.append(f"CITATION.cff: {cited}, __version__ is {version}")
    for one, _, _ in released:
        if not list((ROOT / "tests/fixtures/edit_sets" / one).glob("*/edit_set.json")):
            wrong.append(f"tests/fixtures/edit_sets/{one}: no edit set, `make fixtures` with that version saves some")
    if status := git("status", "--porcelain"):
        wrong.append(f"not committed: {status.replace(chr(10), ', ')}")
    if git("tag", "--list", f"v{version}"):
        wrong.append(f"v{version} is tagged already")
    print(*wrong, sep="\n") if wrong else print(f"{version} can be released")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
