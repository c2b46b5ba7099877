"""Fails where a source distribution lacks a file of the tree that it was made from: check_sdist.py SDIST TREE."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

# What only a clone needs; the link to kernels/ is made anew by setuptools' package_dir.
LEFT_OUT = {".gitignore", ".gitattributes", "coachhook_fast/kernels"}


def names_in_tree(tree: Path) -> set[str]:
    """Files and links of the tree, but for what setuptools wrote there."""
    found = (path for path in tree.rglob("*") if path.is_symlink() or path.is_file())
    names = {path.relative_to(tree).as_posix() for path in found}
    return {name for name in names if "egg-info" not in name and not name.startswith("coachhook_fast/kernels/")}


def main(sdist: Path, tree: Path) -> int:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    missing = sorted(names_in_tree(tree) - names - LEFT_OUT)
    print(f"{sdist}: {len(names)} names, {sdist.stat().st_size / 1e6:.2f} MB")
    if missing:
        print("missing (MANIFEST.in):", *missing, sep="\n  ")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
