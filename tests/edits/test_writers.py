"""The edit set on disk: kills, and several writers and readers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import assert_same, batch_number, edit_set

from coachhook_fast import EditSet
from coachhook_fast.edits import lock, store
from coachhook_fast.edits.lock import LOCK
from coachhook_fast.edits.manifest import MANIFEST
from coachhook_fast.edits.removal import without
from coachhook_fast.edits.threshold import Threshold

KILLS = 200
# ------------------------------------------------------------------ kills


@pytest.mark.slow
def test_a_kill_loses_nothing_acknowledged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL at a random moment of a save, some hundred times. Every time the folder holds a whole version, that of
    the last acknowledged save or of the one under way. Writers are forked from this process, ready to write."""
    context = get_context("fork")
    folder = tmp_path / "edits"
    sets = [edit_set(batches) for batches in range(9)]
    started = time.monotonic()
    for _ in range(5):
        store.save(sets[1], folder)  # it goes on from itself
    usual = (time.monotonic() - started) / 5
    rng = random.Random(0)
    last = 1
    within = 0
    for _ in range(KILLS):
        ours, theirs = context.Pipe(duplex=False)
        writer = context.Process(target=_write, args=(sets, folder, last, theirs))
        writer.start()
        theirs.close()
        acknowledged = last
        ours.recv()  # it begins now
        time.sleep(rng.uniform(0, 2 * usual))
        assert writer.pid is not None
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        while True:
            try:
                acknowledged = ours.recv()
            except EOFError:
                break
        found = store.load(folder)
        following = acknowledged % 8 + 1
        assert len(found.batches) in (acknowledged, following)
        within += len(found.batches) != acknowledged or bool(list(folder.glob("*.tmp")))
        assert_same(found, sets[len(found.batches)])
        last = len(found.batches)
    store.save(sets[3], folder, overwrite=True)
    assert_same(store.load(folder), sets[3])
    left = [path.suffix for path in folder.iterdir() if path.name != LOCK]
    assert sorted(left) == [".json", *[".safetensors"] * 4]  # weights and three batches: all leftovers are swept
    with capsys.disabled():
        print(f"\n  kill test: {KILLS} kills, {within} seen within a save, nothing acknowledged lost")
    assert within > 0


def _write(sets: list[EditSet], folder: Path, last: int, acknowledge: Any) -> None:
    acknowledge.send(last)
    while True:
        last = last % 8 + 1
        store.save(sets[last], folder, overwrite=True)
        acknowledge.send(last)


# ------------------------------------------------------------------ several writers and readers


def _save_often(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's OpenMP threads and would wait for them
    for number in range(12):
        store.save(edit_set(1 + (number + seed) % 5), folder, overwrite=True)


def test_writers_take_turns_and_readers_see_whole_versions(tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    store.save(edit_set(1), folder)
    context = get_context("fork")
    writers = [context.Process(target=_save_often, args=(folder, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        found = store.load(folder)
        assert_same(found, edit_set(len(found.batches)))
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert reads > 3
    assert_same(store.load(folder), edit_set(len(store.load(folder).batches)))


def test_a_dead_writers_lock_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    store.save(edit_set(1), folder)
    code = (
        f"import fcntl; file = open({str(folder / LOCK)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    store.save(edit_set(2), folder)
    assert len(store.load(folder).batches) == 2


def _add_batches(folder: Path, name: str, acknowledged: Any) -> None:
    """Adds batches as a careful writer does: where another was first, it goes on from that one's set."""
    torch.set_num_threads(1)
    mine = store.load(folder)
    for number in range(8):
        while True:
            batch = replace(batch_number(number), id=f"{name}{number}")
            deltas = [
                delta.append(up.residuals, up.directions) for delta, up in zip(mine.deltas, batch.layers, strict=True)
            ]
            longer = replace(mine, deltas=tuple(deltas), batches=(*mine.batches, batch))
            try:
                store.save(longer, folder)
            except store.ConflictError:
                mine = store.load(folder)
            else:
                acknowledged.put(batch.id)
                mine = longer
                break


def test_two_writers_lose_nothing_that_either_acknowledged(tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    store.save(edit_set(1), folder)
    context = get_context("fork")
    acknowledged = context.SimpleQueue()
    writers = [context.Process(target=_add_batches, args=(folder, name, acknowledged)) for name in "abc"]
    for writer in writers:
        writer.start()
    told = [acknowledged.get() for _ in range(24)]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = [batch.id for batch in store.load(folder).batches]  # which checks that updates and weights agree
    assert found == ["batch0000", *found[1:]]
    assert sorted(found[1:]) == sorted(told)


def test_a_writer_whose_base_is_gone_is_refused(tmp_path: Path) -> None:
    """It says whose version stands there; what stands there, stays."""
    folder = tmp_path / "edits"
    store.save(edit_set(2), folder)
    first, second = store.load(folder), store.load(folder)
    shorter = without(first, "batch0000", lambda *_: Threshold(1.0))
    longer = replace(second, deltas=edit_set(3).deltas, batches=edit_set(3).batches)
    store.save(longer, folder)
    with pytest.raises(store.ConflictError) as caught:  # its two batches less one would lose the third
        store.save(shorter, folder)
    assert "of 3 batches up to 'batch0002'" in str(caught.value)
    assert f"process {os.getpid()} on" in str(caught.value)
    assert_same(store.load(folder), longer)
    store.save(longer, folder)  # the one that wrote last goes on
    rest = without(longer, "batch0002", lambda *_: Threshold(1.0))
    store.save(rest, folder)
    assert len(store.load(folder).batches) == 2
    store.save(shorter, folder, overwrite=True)
    assert [batch.id for batch in store.load(folder).batches] == ["batch0001"]


def test_a_set_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    mine = edit_set(2)
    other = replace(edit_set(1), batches=(replace(batch_number(0), id="other"),))
    store.save(other, tmp_path)
    with pytest.raises(store.ConflictError, match="of 1 batches up to 'other'"):
        store.save(mine, tmp_path)
    assert [batch.id for batch in store.load(tmp_path).batches] == ["other"]
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="nothing is saved over it"):
        store.save(mine, tmp_path)
    assert (tmp_path / MANIFEST).read_text() == "{"


def test_whoever_holds_the_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    folder = tmp_path / "edits"
    folder.mkdir()
    with lock.locked(folder), pytest.raises(ValueError, match=f"held for 0.1 s by process {os.getpid()} on"):
        store.save(edit_set(1), folder)
    store.save(edit_set(1), folder)
    for said in (b"", b"[]", b"\xff", b'{"process": "x"}', b"x" * 10_000):
        (folder / LOCK).write_bytes(said)
        assert lock.holder(folder) == "a process that does not say which"
