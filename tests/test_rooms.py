"""The rooms of the package: each imports only from those before it, whenever it does so, and only what is there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import coachhook_fast

PACKAGE = Path(coachhook_fast.__file__).resolve().parent
# `evaluate` is after `editing` as it measures what that did; `bench` times all of them.
ROOMS = (
    "files",
    "limits",
    "printable",
    "model_defaults",
    "config",
    "chat",
    "request",
    "progress",
    "interrupts",
    "kernels",
    "ops",
    "edits",
    "models",
    "hooks",
    "statistics",
    "editing",
    "evaluate",
    "export",
    "bench",
    "integrations",
    "serve",
    "cli",
)
# Import nothing of ours; config its model_defaults and files, request its chat.
ALONE = set(ROOMS[: ROOMS.index("kernels")]) - {"config", "request"}


def sources() -> Iterator[tuple[str, Path]]:
    """(room, file) of every module but the package's own, which only names where public things are."""
    kernels = (PACKAGE / "kernels").rglob("*.py")  # in a checkout a link, which rglob of the package passes by
    for path in sorted({*PACKAGE.rglob("*.py"), *kernels}):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            yield room, path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what a file imports of ours, at its top, within functions and for type checkers alike."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("coachhook_fast"))
        elif isinstance(node, ast.ImportFrom):
            own = path.parent.name == "kernels"  # a folder at the root: its modules name each other, and nothing else
            assert node.level <= int(own), f"{path}:{node.lineno} imports relatively"
            if (node.module or "").split(".")[0] == "coachhook_fast":
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found = ast.unparse(node.args[0]).strip("f'\"")
            if found.startswith("coachhook_fast."):
                yield node.lineno, found


def room_of(name: str) -> str:
    """The room of a dotted name; public names of the package itself have that of their home."""
    first = name.split(".")[1]
    return coachhook_fast._HOMES.get(first, first).split(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room for room, _ in sources()} == set(ROOMS)


def test_rooms_import_in_one_direction() -> None:
    wrong = []
    for room, path in sources():
        for line, name in imports(path):
            other = room_of(name)
            if other == "_C" and room == "ops":  # the extension
                continue
            if other == "kernels" and room not in ("ops", "kernels"):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}: kernels are imported by ops alone")
            elif other not in ROOMS or ROOMS.index(other) > ROOMS.index(room) or (room in ALONE and other != room):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert wrong == []


def test_what_is_imported_is_there() -> None:
    """Also within functions that no test runs, such as those for vLLM."""
    missing = []
    for _, path in sources():
        for line, name in imports(path):
            parts = name.split(".")[1:]
            folder = PACKAGE.joinpath(*parts[:-1])
            if len(parts) > 1 and not folder.is_dir() and not folder.with_suffix(".py").is_file() and "{" not in name:
                missing.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert missing == []
