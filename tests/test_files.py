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


# -------------------------------------------------------------------- new folders


def fill_and_raise(place: Path) -> None:
    with files.new_folder(place) as staging:
        (staging / "file").write_text("x")
        raise KeyboardInterrupt


def fill_while_others_do(place: Path) -> None:
    with files.new_folder(place) as staging:
        (staging / "ours").touch()
        place.mkdir()
        (place / "theirs").touch()


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "some" / "where" / "out"
    with files.new_folder(place) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "file").write_text("x")
        assert not place.exists()
    assert (place / "part" / "file").read_text() == "x"
    with pytest.raises(KeyboardInterrupt):
        fill_and_raise(tmp_path / "never")
    assert [path.name for path in tmp_path.iterdir()] == ["some"]
    assert [path.name for path in place.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_filled_and_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with files.new_folder(tmp_path / "link") as staging:
        (staging / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "file").is_file()


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        fill_while_others_do(tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/theirs"]


def test_what_no_new_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to("nowhere")
    for name, message in {
        "": "is a folder that is not empty", "file": "is not a folder", "lost": "is a link that leads nowhere",
        "file/out": "file is not a folder",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            files.check_new_folder(tmp_path / name)
        with pytest.raises(ValueError, match=message), files.new_folder(tmp_path / name):
            pass
