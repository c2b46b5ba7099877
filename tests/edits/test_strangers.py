"""The edit set on disk: folders and files that strangers made."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import assert_same, change, edit_set, tensors_of, with_tensors

from coachhook_fast.edits import store
from coachhook_fast.edits.lock import LOCK
from coachhook_fast.edits.manifest import MANIFEST


def test_no_other_file_is_written_through_the_folder(tmp_path: Path) -> None:
    """Links under every name that a save makes: what they lead to stays as it is."""
    store.save(edit_set(2), tmp_path / "known")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "edits"
    folder.mkdir()
    for path in (tmp_path / "known").iterdir():
        if path.name != LOCK:
            (folder / path.name).symlink_to(victim)
    (folder / MANIFEST).unlink()
    (folder / f"{MANIFEST}.{os.getpid()}.tmp").symlink_to(victim)
    store.save(edit_set(2), folder)
    assert_same(store.load(folder), edit_set(2))
    assert not [path for path in folder.iterdir() if path.is_symlink()]
    (folder / LOCK).unlink()
    (folder / LOCK).symlink_to(victim)
    with pytest.raises(ValueError, match=r"\.lock is a link"):
        store.save(edit_set(2), folder)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("pattern", [MANIFEST, "weights-*", "batch-*"])
def test_what_is_no_regular_file_of_the_folder_is_refused(saved: Path, tmp_path: Path, pattern: str) -> None:
    victim = next(saved.glob(pattern))
    elsewhere = tmp_path / "elsewhere"
    victim.rename(elsewhere)

    def message() -> str:
        with pytest.raises(ValueError) as caught:
            store.load(saved)
        victim.unlink()
        return str(caught.value)

    victim.symlink_to(elsewhere)
    assert f"{victim} is a link out of its folder" in message()
    victim.symlink_to("/dev/urandom")
    assert str(victim) in message()
    os.mkfifo(victim)
    assert f"{victim} is a FIFO" in message()
    with victim.open("wb") as file:
        file.truncate(1 << 40)
    assert f"{victim} has {1 << 40} bytes" in message()


def header(text: str, rest: int = 0) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + b"\0" * rest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header has 0 bytes"),
        (b"x" * 40, "header has"),
        (struct.pack("<Q", 1 << 62), "header has"),
        (header("{}"), "lacks the tensors"),
        (header("[" * 100_000), "nested too deeply"),
        (header('{"0.B": 1, "0.B": 2}'), "is there twice"),
        (header('{"0.B": 1, "1.B": 1}'), "dtype None"),
        (header('{"0.B": {"dtype": "F32", "shape": [9e9, 1]}, "1.B": 1}'), "shape"),
        (header('{"0.B": {"dtype": "F32", "shape": [4000000000, 4000000000]}, "1.B": 1}'), "shape"),
        (header('{"0.B": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}, "1.B": 1}'), "offsets"),
        (header('{"0.B": {"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 8]}, "1.B": 1}'), "shape"),
        (header('{"0.B": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}, '
                '"1.B": {"dtype": "F32", "shape": [1, 2], "data_offsets": [4, 12]}}', 12), "no safetensors file"),
        (header('{"0.B": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}, '
                '"1.B": {"dtype": "F64", "shape": [1000000, 1000000], "data_offsets": [8, 8000000000008]}}', 8),
         "tells of 8000000000008 bytes, it has 8"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_tensor_files_that_claim_what_they_do_not_hold(saved: Path, content: bytes, message: str) -> None:
    with_tensors(saved, "weights", content)
    with pytest.raises(ValueError, match=message) as caught:
        store.load(saved)
    assert str(saved / "weights-") in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("kind", ["weights", "batch"])
def test_dtypes_that_no_editor_writes(saved: Path, dtype: torch.dtype, kind: str) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(saved, kind).items()}
    with_tensors(saved, kind, tensors)
    with pytest.raises(ValueError, match="has dtype"):
        store.load(saved)


def test_unknown_tensors(saved: Path) -> None:
    with_tensors(saved, "weights", {**tensors_of(saved, "weights"), "7.B": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match=r"unknown tensors \['7.B'\]"):
        store.load(saved)


@pytest.mark.parametrize("name", ["/abs/evil", "../evil", "a.b", "x" * 65, 3, None, "a\n"])
def test_statistics_are_named_never_a_path(saved: Path, name: Any) -> None:
    change(saved, lambda m: m.update(statistics=name))
    with pytest.raises(ValueError, match="statistics must be the name of a run"):
        store.load(saved)


def test_a_tensor_file_damaged_at_equal_size_is_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    store.save(edit_set(1), folder)
    victim = next(folder.glob("batch-*"))
    victim.write_bytes(b"\0" * victim.stat().st_size)
    store.save(edit_set(2), folder)
    assert_same(store.load(folder), edit_set(2))
