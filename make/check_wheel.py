"""Fails where a wheel lacks the extension or a file of the package, or holds what is not its own.

check_wheel.py WHEEL TREE
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def wanted(tree: Path) -> set[str]:
    """The package's files, with kernels/ where it is installed."""
    names = set()
    for folder, prefix in (("coachhook_fast", "coachhook_fast"), ("kernels", "coachhook_fast/kernels")):
        for path in (tree / folder).rglob("*"):
            inside = path.relative_to(tree / folder).as_posix()
            if path.is_file() and path.suffix not in (".so", ".pyc") and not path.is_symlink():
                names.add(f"{prefix}/{inside}")
    return names


def main(wheel: Path, tree: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    libraries = {name: size for name, size in sizes.items() if ".so" in Path(name).name}
    extensions = [name for name in libraries if name.startswith("coachhook_fast/_C.")]
    own = [name for name in sizes if name.startswith(("coachhook_fast/", "coachhook_fast-"))]
    wrong = [f"missing: {name}" for name in sorted(wanted(tree) - set(sizes))]
    wrong += [
        f"not the package's: {name}" for name in sizes if name not in own or name in set(libraries) - {*extensions}
    ]
    if not extensions:
        wrong.append("missing: coachhook_fast/_C, the extension")
    packed, inside, library = wheel.stat().st_size / 1e6, sum(sizes.values()) / 1e6, sum(libraries.values()) / 1e6
    print(f"{wheel}: {packed:.2f} MB, {inside:.2f} MB unpacked, {library:.2f} MB of it the extension")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
