"""The edit set on disk: kills, damage, several writers, unknown content, the hub."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import assert_same, batch_number, change, edit_set, tensors_of, with_tensors
from tiny import tiny_model, tiny_tokenizer

from coachhook_fast import EditSet, load_edits
from coachhook_fast.edits import lock, store
from coachhook_fast.edits.edit_set import without
from coachhook_fast.edits.lock import LOCK
from coachhook_fast.edits.manifest import MANIFEST, read_manifest, version_of
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.models.loading import fingerprint

KILLS = 200
# ------------------------------------------------------------------ kills


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


# ------------------------------------------------------------------ damage and strangers


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    store.save(edit_set(2), tmp_path / "edits")
    return tmp_path / "edits"


def test_a_set_for_serving_says_that_it_lacks_the_updates(saved: Path) -> None:
    served = store.load(saved, updates=False)
    with pytest.raises(ValueError, match="loaded for serving"):
        served.edit_keys(0)


def test_saving_beside_a_model_leaves_its_files_alone(tmp_path: Path) -> None:
    others = ("model.safetensors", "adapter.safetensors", "download.tmp", "weights-of-mine.safetensors")
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    for count in (1, 2):
        store.save(edit_set(count), tmp_path)
    assert all((tmp_path / name).read_bytes() == b"mine" for name in others)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) == 2  # ours and theirs: the first version's is swept


def test_a_damaged_tensor_file_is_named(saved: Path) -> None:
    victim = next(saved.glob("batch-*"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=f"{victim.name} is damaged"):
        store.load(saved)
    victim.unlink()
    with pytest.raises(ValueError, match=f"{victim.name} is missing"):
        store.load(saved)
    assert len(store.load_weights(saved)) == 2  # serving needs no batch file


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format=99), "format 99"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["config"].update(surprise=1), "surprise"),
        (lambda m: m["batches"][0].update(surprise=1), "surprise"),
        (lambda m: m["batches"][0]["outcomes"][0]["request"].update(surprise=1), "surprise"),
        (lambda m: m["batches"].pop(0), "does not follow"),
    ],
)
def test_unknown_content_raises(saved: Path, edit: Any, message: str) -> None:
    change(saved, edit)
    with pytest.raises(ValueError, match=message):
        store.load(saved)


@pytest.mark.parametrize("wrong", [None, [], {}, "x", -1, True, [None], {"a": 1}], ids=repr)
def test_any_value_of_another_kind_is_refused_by_name_or_harmless(saved: Path, wrong: Any) -> None:
    """Every value of a manifest in turn: nothing but a ValueError that names the folder comes of it."""
    whole = json.loads((saved / MANIFEST).read_text())
    messages = []
    for path in list(places(whole)):
        manifest = copy.deepcopy(whole)
        target = manifest
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = wrong
        (saved / MANIFEST).write_text(json.dumps(manifest))
        for read in (store.load, store.load_weights, read_manifest):
            try:
                read(saved)
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > 20
    assert [message for message in messages if str(saved) not in message] == []


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values within `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_files_outside_the_folder_are_not_read(saved: Path, tmp_path: Path) -> None:
    name = next(saved.glob("weights-*")).name
    (saved / name).rename(tmp_path / name)
    change(saved, lambda m: m["weights"].update(file=f"../{name}"))
    with pytest.raises(ValueError, match="a tensor file is called"):
        store.load(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01"])
def test_a_manifest_that_is_no_json_object(saved: Path, content: str) -> None:
    (saved / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"JSON|format|UTF-8"):
        store.load(saved)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    own = edit_set(1, fingerprint(model))
    store.save(own, tmp_path / "own")
    store.save(edit_set(1), tmp_path / "other")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="another base model"):
        load_edits(model, tmp_path / "other")
    assert [name for name, _ in model.named_modules()] == before
    load_edits(model, tmp_path / "own")
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="another base model"):
        load_edits(other, tmp_path / "own")


def test_versions_tell_edit_sets_apart(tmp_path: Path) -> None:
    names = set()
    for number, value in enumerate((edit_set(1), edit_set(2), edit_set(1).with_thresholds([Threshold(9.0)] * 2))):
        store.save(value, tmp_path / str(number))
        names.add(version_of(read_manifest(tmp_path / str(number))))
        store.save(replace(value, contexts=("Else.",)), tmp_path / str(number))  # not served
        names.add(version_of(read_manifest(tmp_path / str(number))))
    assert len(names) == 3
    same = edit_set(1)
    for relative in (True, False):
        store.save(replace(same, config=same.config.replace(threshold_relative=relative)), tmp_path / "again")
        names.add(version_of(read_manifest(tmp_path / "again")))
    assert len(names) == 4  # what thresholds are compared with is served as well


# ------------------------------------------------------------------ the hub


class FakeHub:
    """The calls of huggingface_hub that we make, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, token: str | None = None) -> FakeHub:  # HfApi(token=...)
        self.calls.append(("HfApi", {"token": token}))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
        self.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
        for path in (self.folder / repo_id).iterdir():
            if any(fnmatch(path.name, pattern) for pattern in options["delete_patterns"]):
                path.unlink()
        for pattern in options["allow_patterns"]:
            for path in Path(folder_path).glob(pattern):
                shutil.copy2(path, self.folder / repo_id)
        return f"https://huggingface.co/{repo_id}"

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("snapshot_download", {"repo_id": repo_id, **options}))
        return str(self.folder / repo_id)


def test_push_to_hub_and_load_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    model = tiny_model("llama")
    value = edit_set(2, fingerprint(model))
    address = store.push_to_hub(value, "ann/edits", private=True, token="secret")
    assert address == "https://huggingface.co/ann/edits"
    assert [name for name, _ in hub.calls] == ["HfApi", "create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"token": "secret"}
    assert hub.calls[1][1]["private"] is True
    assert not list((tmp_path / "ann" / "edits").glob(".lock"))
    load_edits(model, "ann/edits")
    assert model.coachhook.edit_set.num_edits == 4
    ids = torch.tensor([tiny_tokenizer()("Ann is").input_ids])
    assert model(ids).logits.isfinite().all()


def test_a_push_replaces_the_edit_set_and_leaves_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub(tmp_path))
    store.push_to_hub(edit_set(2, "model"), "ann/model")
    weights = ["model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors"]
    for name in weights:
        (tmp_path / "ann" / "model" / name).write_bytes(b"weights")
    store.push_to_hub(edit_set(1, "model"), "ann/model")
    assert store.load(tmp_path / "ann" / "model").num_edits == 2
    left = {path.name for path in (tmp_path / "ann" / "model").glob("*.safetensors")}
    assert left > set(weights)
    assert len(left) == len(weights) + 2  # one of weights, one batch


def test_a_name_that_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="holds no edit set"):
        load_edits(tiny_model("llama"), tmp_path / "nothing")


# ------------------------------------------------------------------ folders of strangers


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
