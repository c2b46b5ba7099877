"""The edit set on disk: damage, unknown content, other models, the hub."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import change, edit_set
from tiny import tiny_model, tiny_tokenizer

from coachhook_fast import load_edits
from coachhook_fast.edits import store
from coachhook_fast.edits.hub import local_folder
from coachhook_fast.edits.manifest import MANIFEST, read_manifest, version_of
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.models.loading import fingerprint


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
    with pytest.raises(ValueError, match=r"no folder 'ann/edits'.* 'hf:ann/edits'"):
        load_edits(model, "ann/edits")  # a missing folder is not looked up elsewhere
    assert len(hub.calls) == 3
    load_edits(model, "hf:ann/edits", revision="0f6c2d1")
    assert hub.calls[3][1]["revision"] == "0f6c2d1"
    assert local_folder("hf:ann/edits@v2") == tmp_path / "ann" / "edits"
    assert hub.calls[4][1]["revision"] == "v2"
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


@pytest.mark.parametrize(
    "name", ["hf:", "hf:edits", "hf:a/b/c", "hf:ann/edits@", "hf:../x", "hf:/etc/passwd", "hf:a b/c"]
)
def test_names_that_no_repository_has(name: str) -> None:
    with pytest.raises(ValueError, match="edits must be hf:owner/name"):
        local_folder(name)


def test_revisions_of_folders_and_two_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"revision 'v1' is of a repository of the hub, .* is a folder"):
        local_folder(tmp_path, revision="v1")
    with pytest.raises(ValueError, match="with one revision"):
        local_folder("hf:ann/edits@v1", revision="v2")


def test_a_name_that_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="holds no edit set"):
        load_edits(tiny_model("llama"), tmp_path / "nothing")
