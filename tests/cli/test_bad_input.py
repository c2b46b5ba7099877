"""The command line refuses bad input with one line on stderr and exit code 2, before anything is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import QUICK, edits, facts, fails, model, out, run_json
from tiny import tiny_facts, tiny_model, tiny_tokenizer

from coachhook_fast.cli import main
from coachhook_fast.edits.removal import without
from coachhook_fast.edits.threshold import Threshold


def test_argument_errors_are_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model" in fails(capsys, "edit")
    assert "must be an integer of at least 1, got '0'" in fails(capsys, "edit", "--batch-size", "0")
    assert "invalid choice" in fails(capsys, "edit", "--gate", "none")
    with pytest.raises(SystemExit) as end:
        main(["frobnicate"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "v_lr"], "--set must be KEY=VALUE, got 'v_lr'"),
        (["--set", "v_lr=fast"], "v_lr must be a number, got 'fast'"),
        (["--set", "speed=3"], r"unknown setting(s) ['speed']"),
        (["--layers", "four"], "--layers must be block numbers under 10000 such as 4,5,6 or 4-8, got 'four'"),
        (["--layers", "0-99999999999"], "--layers must be block numbers under 10000"),
        (["--facts", "/dev/zero"], "/dev/zero is a device"),
        (["--config", "/dev/zero"], "/dev/zero is a device"),
        (["--corpus", "/dev/zero"], "/dev/zero is a device"),
        (["--layers", "2,1"], "layers must be ascending"),
        (["--layers", "99"], "layers [99] are out of range: the model has blocks 0 to 4"),
        (["--dtype", "float99"], "dtype must name a"),
        (["--device", "warp"], "on device 'warp'"),
        (["--set", "context_seeds=The"], "context_seeds must be a list, got 'The'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--facts", "nowhere.json"], "nowhere.json"),
        (["--model", "nowhere"], "model 'nowhere'"),
    ],
)
def test_bad_edit_arguments(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no hub, so no retries
    # Later arguments win, so that `extra` may replace the good ones.
    assert message in fails(capsys, "edit", *model(home), *facts(home), *out(home, "never"), *extra)
    assert not (home / "never").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(home / "model"), "--device", "cuda", "x"]
    assert "on device 'cuda'" in fails(capsys, *arguments)


def test_facts_that_no_batch_can_take_stop_before_the_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tiny_facts(2)
    path = home / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, {**bad, "prompt": "word " * 400 + "{}"}])))
    arguments = ["edit", *model(home), "--facts", str(path), *QUICK, "--batch-size", "1", *out(home, "long")]
    assert "the fact of case 1: requests[0].prompt" in fails(capsys, *arguments)
    assert not (home / "long").exists()
    data = run_json(capsys, *arguments, "--skip-invalid")
    assert (len(data["edits"]), len(data["skipped"])) == (1, 1)
    path.write_text(json.dumps({**bad, "prompt": "word " * 400 + "{}"}))
    assert "holds no fact that this model can take" in fails(
        capsys, *arguments[:-1], str(home / "none"), "--skip-invalid"
    )


def test_a_batch_that_contradicts_itself_stops_before_the_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tiny_facts(2)
    path = home / "contradiction.jsonl"
    path.write_text("\n".join(map(json.dumps, [first, second, first, {**first, "target_new": "sailor"}])))
    arguments = ["edit", *model(home), "--facts", str(path), *QUICK, "--batch-size", "2", *out(home, "contradiction")]
    assert "batch 2: requests[1]" in fails(capsys, *arguments)
    assert not (home / "contradiction").exists()


def test_text_that_outgrows_the_context(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exceed the model's context" in fails(capsys, "generate", *model(home), "--max-new-tokens", "9999", "hello")


def test_edit_never_overwrites_an_edit_set(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "edit", *model(home), *facts(home), *out(home, "edits"))
    assert "holds an edit set already" in message
    assert "--out DIR is needed" in fails(capsys, "edit", *model(home), *facts(home))
    assert "is not a folder" in fails(capsys, "edit", *model(home), *facts(home), *out(home, "facts.jsonl"))
    other_layers = fails(capsys, "edit", *model(home), *facts(home), *edits(home), "--layers", "3")
    assert "were made with (1, 2)" in other_layers


def test_invalid_facts_raise_or_are_counted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tiny_facts(2)
    path = home / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, {**bad, "target_new": ""}])))
    arguments = ["eval", *model(home), "--facts", str(path), "--metrics", "accuracy"]
    assert "record 1: EditRequest.target_new is empty" in fails(capsys, *arguments)
    data = run_json(capsys, *arguments, "--skip-invalid")
    assert (data["edits"], data["skipped"]) == (1, 1)
    path.write_text(json.dumps({**bad, "target_new": ""}))
    assert "holds no valid edit" in fails(capsys, *arguments, "--skip-invalid")


def test_other_bad_input(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no edit set" in fails(capsys, "log", "--edits", str(home))
    assert "is not in the ledger" in fails(capsys, "rollback", *model(home), *edits(home), "nothing")
    assert "PROMPT is empty" in fails(capsys, "generate", *model(home), " ")
    assert "--ungated needs --edits" in fails(capsys, "eval", *model(home), *facts(home), "--ungated")
    assert "['beauty']" in fails(capsys, "eval", *model(home), *facts(home), "--metrics", "beauty")
    assert "NAME must be one of" in fails(capsys, "bench", "nothing")
    tiny_model("llama", seed=1).save_pretrained(home / "stranger")
    tiny_tokenizer().save_pretrained(home / "stranger")
    strange = ["--model", str(home / "stranger")]
    assert "another base model" in fails(capsys, "generate", *strange, *edits(home), "x")
    assert "another base model" in fails(capsys, "edit", *strange, *facts(home), *edits(home))


def test_ctrl_c_exits_130(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import coachhook_fast.edits.manifest

    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(coachhook_fast.edits.manifest, "read_manifest", interrupt)
    assert main(["log", *edits(home)]) == 130
    assert capsys.readouterr().err == "coachhook log: interrupted\n"


@pytest.mark.parametrize("verb", ["log", "generate", "rollback", "edit"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: manifest["batches"][0].pop("outcomes"),
        lambda manifest: manifest["batches"][0].pop("id"),
        lambda manifest: manifest["batches"][0].update(seconds="long"),
        lambda manifest: manifest["batches"][0]["outcomes"][0].pop("request"),
        lambda manifest: manifest["batches"][0]["outcomes"][0].update(request={}),
        lambda manifest: manifest.update(batches=None),
        lambda manifest: manifest["batches"].append("batch"),
        lambda manifest: manifest.update(config=[1]),
        lambda manifest: manifest["config"].update(layers=None),
        lambda manifest: manifest["thresholds"].pop(),
        lambda manifest: manifest["thresholds"].__setitem__(0, ["1", 2, 3]),
        lambda manifest: manifest["thresholds"].__setitem__(0, [1, 2]),
        lambda manifest: manifest.update(weights="file"),
    ],
    ids=lambda damage: "",
)
def test_a_manifest_changed_by_hand(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, damage: Callable[[Any], Any]
) -> None:
    folder = tmp_path / "edits"
    shutil.copytree(home / "edits", folder)
    manifest = json.loads((folder / "edit_set.json").read_text())
    damage(manifest)
    (folder / "edit_set.json").write_text(json.dumps(manifest))
    arguments = {
        "log": [],
        "generate": [*model(home), "x"],
        "rollback": [*model(home), "x"],
        "edit": [*model(home), *facts(home)],
    }[verb]
    assert str(folder) in fails(capsys, verb, *arguments, "--edits", str(folder))


def test_damaged_files_are_named(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    binary, settings, gguf = tmp_path / "bytes.txt", tmp_path / "cut.yaml", tmp_path / "cut.gguf"
    binary.write_bytes(bytes(range(256)) * 10)
    settings.write_text("layers: [\n")
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00")
    for name, content in (("tokenizer.json", "{"), ("config.json", "{")):
        shutil.copytree(home / "model", tmp_path / name)
        (tmp_path / name / name).write_text(content)
        assert f"model '{tmp_path / name}' could not be loaded" in fails(
            capsys, "generate", "--model", str(tmp_path / name), "x"
        )
    assert f"model '{gguf}' is no GGUF file that can be loaded" in fails(capsys, "generate", "--model", str(gguf), "x")
    assert f"{settings} is not YAML" in fails(
        capsys, "edit", *model(home), *facts(home), "--config", str(settings), *out(home, "never")
    )
    stats = ["stats", *model(home), "--layers", "1", "--corpus", str(binary)]
    assert f"corpus file {binary} is not UTF-8" in fails(capsys, *stats)
    held_out = ["eval", *model(home), *facts(home), "--perplexity", str(binary)]
    assert f"--perplexity {binary} is not UTF-8" in fails(capsys, *held_out)


@pytest.mark.parametrize("argument", ["--facts", "--config"])
def test_what_is_too_large_or_no_file_is_not_read(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, argument: str
) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 31)
    os.mkfifo(tmp_path / "fifo")
    arguments = ["edit", *model(home), *facts(home), *out(home, "never"), argument]
    assert f"{tmp_path / 'sparse'} has {1 << 31} bytes" in fails(capsys, *arguments, str(tmp_path / "sparse"))
    assert f"{tmp_path / 'fifo'} is a FIFO" in fails(capsys, *arguments, str(tmp_path / "fifo"))


@pytest.mark.slow
def test_settings_nested_too_deeply(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("layers: " + "[" * 5000)
    arguments = ["edit", *model(home), *facts(home), *out(home, "never")]
    assert "nested too deeply" in fails(capsys, *arguments, "--config", str(tmp_path / "deep.yaml"))
    assert "nested too deeply" in fails(capsys, *arguments, "--set", "layers=" + "[" * 5000)


def test_a_folder_that_another_run_filled_meanwhile(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New --out, and --edits that another run went on from: refused, with what that run saved left as it is."""
    from coachhook_fast.editing.editor import Editor
    from coachhook_fast.edits import store

    edit = Editor.edit
    folder = tmp_path / "edits"

    def slow(self: Editor, *arguments: Any, **options: Any) -> Any:
        batch = edit(self, *arguments, **options)
        store.save(other, folder)  # another run is quicker
        return batch

    monkeypatch.setattr(Editor, "edit", slow)
    other = store.load(home / "edits")
    arguments = ["edit", *model(home), *facts(home), "--batch-size", "1"]
    latest = other.batches[-1].id
    line = fails(capsys, *arguments, *QUICK, "--limit", "1", "--out", str(folder))
    assert f"{folder} holds another edit set by now, of 2 batches up to {latest!r}, written by process" in line
    assert [batch.id for batch in store.load(folder).batches] == [batch.id for batch in other.batches]
    other = replace(other, batches=(*other.batches, replace(other.batches[0], id="third")))
    other = without(other, other.batches[0].id, lambda *_: Threshold(1.0))
    shutil.rmtree(folder)
    shutil.copytree(home / "edits", folder)
    other.seen[str(folder.resolve())] = store.state_of(store.load(folder))
    assert "up to 'third'" in fails(capsys, *arguments, "--edits", str(folder))
    assert [batch.id for batch in store.load(folder).batches] == [batch.id for batch in other.batches]


@pytest.mark.parametrize("option", ["--out", "--edits"])
@pytest.mark.parametrize("name", ["", " "])
def test_a_folder_without_a_name(home: Path, capsys: pytest.CaptureFixture[str], option: str, name: str) -> None:
    line = fails(capsys, "edit", *model(home), *facts(home), f"{option}={name}")
    assert f"argument {option}: must name a folder, got {name!r}" in line


def test_a_missing_folder_is_not_looked_up_on_the_hub(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "generate", *model(home), "--edits", "edits/acme", "Ann is")
    assert "there is no folder 'edits/acme'; a repository of the hub is asked for as 'hf:edits/acme'" in line
    assert "hf:owner/name" in fails(capsys, "generate", *model(home), "--edits", "hf:acme", "Ann is")
