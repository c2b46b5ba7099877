"""What a GGUF file says of itself, measured before a library sets anything aside for it.

    "GGUF"  version u32  tensors u64  entries u64   then each entry: key, type u32, value

A string is a length u64 and its bytes; an array is a type u32, a length u64 and the values.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from coachhook_fast import files
from coachhook_fast.limits import MOST_LAYERS

_MOST_TENSORS = 200_000  # 10 000 blocks of twenty
_MOST_ENTRIES = 10_000
_MOST_KEY = 65_535  # the format's own
_MOST_SIZE = 1 << 24  # of a width, a vocabulary or a context
_MOST_FILE = 4 << 40
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_DEPTH = 4  # of arrays in arrays
_SIZES = ("embedding_length", "feed_forward_length", "context_length", "attention.head_count", "vocab_size")


def check_gguf_header(path: Path) -> None:
    """ValueError unless the file is GGUF whose counts and lengths are within it and within what models have."""
    try:
        with files.opened(path, most=_MOST_FILE) as file:
            left = os.fstat(file.fileno()).st_size
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            _, tensors, entries = struct.unpack("<IQQ", file.read(20))
            for what, count, most in (("tensors", tensors, _MOST_TENSORS), ("entries", entries, _MOST_ENTRIES)):
                if count > most:
                    raise ValueError(f"it tells of {count} {what}, at most {most} are read")
            for _ in range(entries):
                key = file.read(_length(file, _MOST_KEY, left)).decode()
                (kind,) = struct.unpack("<I", file.read(4))
                _check_size(key, _value(file, kind, left, 0))
    except (ValueError, struct.error, KeyError, OverflowError) as error:
        said = error if isinstance(error, ValueError) else "its header ends early or has a type that GGUF has not"
        raise ValueError(f"model {str(path)!r} is no GGUF file that can be loaded: {said}") from None


def _check_size(key: str, value: object) -> None:
    if not isinstance(value, int):
        return
    most = MOST_LAYERS if key.endswith(".block_count") else _MOST_SIZE if key.endswith(_SIZES) else None
    if most is not None and not 0 <= value <= most:
        raise ValueError(f"{key} is {value}, at most {most} is read")


def _value(file: BinaryIO, kind: int, left: int, depth: int) -> object:
    """A number; None for what is passed over."""
    if kind in _NUMBERS:
        return struct.unpack(_NUMBERS[kind], file.read(struct.calcsize(_NUMBERS[kind])))[0]
    if kind == _STRING:
        _skip(file, _length(file, left, left), left)
        return None
    if kind != _ARRAY or depth > _MOST_DEPTH:
        raise ValueError(f"a value has the type {kind}" if kind != _ARRAY else "its arrays are nested too deeply")
    (kind,) = struct.unpack("<I", file.read(4))
    count = _length(file, left, left)
    if kind in _NUMBERS:
        _skip(file, count * struct.calcsize(_NUMBERS[kind]), left)
    else:
        for _ in range(count):  # each takes bytes of the file, so there are no more than it has
            _value(file, kind, left, depth + 1)
    return None


def _length(file: BinaryIO, most: int, left: int) -> int:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(most, left - file.tell()):
        raise ValueError(f"it tells of {length} bytes or values where {max(0, left - file.tell())} bytes are left")
    return int(length)


def _skip(file: BinaryIO, size: int, left: int) -> None:
    if size > left - file.tell():
        raise ValueError(f"it tells of {size} bytes where {max(0, left - file.tell())} are left")
    file.seek(size, os.SEEK_CUR)
