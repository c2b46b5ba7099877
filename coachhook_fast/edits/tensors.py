"""Tensor files of an edit set: safetensors under a name of their content, read with every claim checked first."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from coachhook_fast import files

_DTYPES = {"F32": 4, "F64": 8}  # of an editor's deltas, keys and updates
_MOST_HEADER = 16 * files.MiB
Shapes = Mapping[str, tuple[int | None, int | None]]
_MOST_COUNT = 1 << 40  # numbers in a tensor: products of sizes stay far from any overflow


def write_tensors(folder: Path, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Writes a file named by its content, unless it is there; its name and sha256 for the manifest."""
    content = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"{kind}-{digest[:16]}.safetensors"
    if files.digest_of(path) != digest:  # not there, a link, or damaged since
        files.write_synced(path, content)
    return {"file": path.name, "sha256": digest}


def read_tensors(
    folder: Path, entry: Mapping[str, str], needed: set[str], others: set[str], shapes: Shapes | None = None
) -> dict[str, Tensor]:
    """What the file of `entry` holds.

    Args:
        shapes: (rows, columns) that tensors must have, None for any number.

    Raises:
        ValueError: it is missing, damaged, no regular file of the folder, no safetensors file, or without a tensor of
            `needed`; it has one that is not in `needed` or `others`, or not of fp32 or fp64. The message names the
            file.
    """
    path = folder / entry["file"]
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"{str(path)!r} is no name of a file in the edit set's folder")
    try:
        # Once: a writer may sweep the file at any moment.
        with files.opened(path, most=files.MOST_TENSORS, within=folder) as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= _MOST_HEADER:
                raise ValueError(f"{path} is no safetensors file: its header has {length} bytes")
            header = file.read(length)
            size = check_header(path, header, needed, others, shapes or {})
            left = os.fstat(file.fileno()).st_size - 8 - length
            if size != left:
                raise ValueError(f"{path} is no safetensors file: its header tells of {size} bytes, it has {left}")
            content = b"".join((start, header, file.read(size)))
    except FileNotFoundError:
        raise ValueError(f"edit set is incomplete: {path} is missing") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(f"{path} is damaged: sha256 {digest}, the edit set names {entry['sha256']}")
    try:
        return from_bytes(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def check_header(path: Path, header: bytes, needed: set[str], others: set[str], shapes: Shapes) -> int:
    """Bytes of tensors that a safetensors header announces; ValueError as for `read_tensors`."""
    try:
        entries = files.parse_json(header.decode())
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is no safetensors file: its header is no object")
    entries.pop("__metadata__", None)
    if not needed <= entries.keys():
        raise ValueError(f"{path} lacks the tensors {sorted(needed - entries.keys())}")
    if unknown := sorted(entries.keys() - needed - others):
        raise ValueError(f"{path} holds the unknown tensors {unknown[:8]}")
    ends = {name: _end_of(path, name, entry) for name, entry in entries.items()}
    for name, wanted in shapes.items():
        found = entries.get(name, {}).get("shape", wanted)
        if any(want not in (None, size) for want, size in zip(wanted, found, strict=True)):
            raise ValueError(f"{path}: {name} has shape {found}, the model's layer needs {list(wanted)}")
    return max(ends.values(), default=0)


def _end_of(path: Path, name: str, entry: Any) -> int:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype!r}, an edit set's are {' and '.join(_DTYPES)}")
    if not _sizes(shape) or len(shape) != 2 or math.prod(shape) > _MOST_COUNT:
        raise ValueError(f"{path}: {name} has shape {shape!r}, an edit set's tensors are matrices")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype]:
        raise ValueError(f"{path}: {name} has offsets {offsets!r} for {dtype} {shape}")
    return int(offsets[1])


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
