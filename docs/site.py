"""A hook of MkDocs: what pages link to outside of docs/ (SECURITY.md, results, figures) comes along, under files/."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "files/"
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def _place(source: str) -> str:
    """Where a page of the site lies in the repository."""
    return source.removeprefix(OUTSIDE) if source.startswith(OUTSIDE) else f"docs/{source}"


def _source(place: str) -> str:
    """Where a file of the repository lies in the site."""
    return place.removeprefix("docs/") if place.startswith("docs/") else OUTSIDE + place


def _linked(place: str, text: str) -> set[str]:
    """Files of the repository that a page links to."""
    here = posixpath.dirname(place)
    return {posixpath.normpath(posixpath.join(here, target)) for _, target, _ in _LINK.findall(text)}


def on_files(files: Any, config: Any) -> Any:
    """Takes in what is linked, and what that links to in turn."""
    waiting = [_place(file.src_uri) for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        place = waiting.pop()
        for target in _linked(place, (ROOT / place).read_text(encoding="utf-8")) - seen:
            seen.add(target)
            if target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            files.append(File.generated(config, _source(target), abs_src_path=str(ROOT / target)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links lead to where the files are in the site."""
    source = page.file.src_uri
    place = _place(source)

    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found[2]))
        return found[1] + posixpath.relpath(_source(target), posixpath.dirname(source) or ".") + found[3]

    return _LINK.sub(moved, markdown)
