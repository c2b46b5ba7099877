"""Files of strangers: what is no regular file, too large or leads elsewhere is refused before it is read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from coachhook_fast import files


def refused(path: Path, within: Path | None = None, most: int = 100) -> str:
    with pytest.raises(ValueError) as caught:
        files.read_bytes(path, most=most, within=within)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """None of these is waited for."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "random").symlink_to("/dev/urandom")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name, kind in {
        "folder": "a folder", "fifo": "a FIFO", "zero": "a device", "random": "a device", "socket": "a socket",
    }.items():  # fmt: skip
        assert kind in refused(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "nothing", most=1)


def test_sizes_are_limited_before_anything_is_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert "at most 100 are read" in refused(tmp_path / "sparse")
    (tmp_path / "small").write_bytes(b"x" * 100)
    assert files.read_bytes(tmp_path / "small", most=100) == b"x" * 100
    refused(tmp_path / "small", most=99)


def test_links_stay_within_a_strangers_folder(tmp_path: Path) -> None:
    home = tmp_path / "edits"
    (home / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (home / "own").write_bytes(b"own")
    (home / "out").symlink_to("../secret")
    (home / "in").symlink_to("inner/../own")
    (home / "loop").symlink_to("loop")
    assert "a link out of its folder" in refused(home / "out", home)
    refused(home / "inner" / ".." / ".." / "secret", home)
    assert files.read_bytes(home / "in", most=9, within=home) == b"own"
    assert files.read_bytes(home / "out", most=9) == b"secret"  # named by the user
    with pytest.raises((ValueError, OSError), match="loop"):
        files.read_bytes(home / "loop", most=9, within=home)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--ann--edits"
    for folder in ("blobs", "snapshots/abc"):
        (repo / folder).mkdir(parents=True)
    (repo / "blobs" / "0123").write_bytes(b"content")
    (repo / "refs").write_bytes(b"other")
    snapshot = repo / "snapshots" / "abc"
    (snapshot / "file").symlink_to("../../blobs/0123")
    (snapshot / "out").symlink_to("../../refs")
    assert files.read_bytes(snapshot / "file", most=9, within=snapshot) == b"content"
    refused(snapshot / "out", snapshot)


def test_text_is_read_line_by_line_and_long_ones_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_LINE", 4)
    (tmp_path / "text").write_text("ab\nabcdefghi\n\nµ", encoding="utf-8")
    assert list(files.text_lines(tmp_path / "text")) == ["ab\n", "abcd", "efgh", "i\n", "\n", "µ"]
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="bytes is not UTF-8"):
        list(files.text_lines(tmp_path / "bytes"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        ('{"x": {"b": 1, "b": 1}}', "'b' is there twice"),
        ("[NaN]", "NaN"),
        ("-Infinity", "-Infinity"),
        ("[" * 200_000, "nested too deeply"),
        ("{", "Expecting"),
        ("1" * 5000, "digits"),
    ],
)
def test_json_is_read_strictly(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files.parse_json(text)


def test_writing_never_goes_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    files.write_synced(tmp_path / "link", b"new")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "victim"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_synced(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_of_our_own_is_no_link_and_has_one_name(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "second").hardlink_to(victim)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "second", "fifo"):
        with pytest.raises(ValueError, match=name):
            files.open_own(tmp_path / name)
    assert victim.read_bytes() == b"precious"
    for _ in range(2):
        os.close(files.open_own(tmp_path / "new"))
