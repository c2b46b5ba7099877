"""`coachhook export` on the command line: what it prints, its exit codes, and that bad input costs nothing."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from cli_cases import fails, model, run_json, run_text
from editor_cases import logits
from tiny import tiny_model

from coachhook_fast import Editor
from coachhook_fast.cli import build_parser
from coachhook_fast.export import Limits

LOOSE = ["--max-said-lost", "1", "--max-others-changed", "1", "--max-perplexity-ratio", "1000"]


def export(home: Path, out: Path, format: str, *more: str) -> list[str]:
    text = home / "held-out.txt"
    text.write_text("Nobody in Lund had seen so much snow, said the baker of Graz.")
    held_out = ["--perplexity", str(text)]
    return ["export", str(home / "edits"), str(out), *model(home), "--format", format, *held_out, *more]


def test_both_formats(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, *export(home, tmp_path / "merged", "merged", *LOOSE))
    assert [row["way"] for row in data["ways"]] == ["unedited", "gated", "ungated"]
    assert (data["facts"], data["refused"], data["out"]) == (4, None, str(tmp_path / "merged"))
    record = json.loads((tmp_path / "merged" / "coachhook_export.json").read_text())
    assert {key: record[key] for key in ("facts", "others", "ways")} == {
        key: data[key] for key in ("facts", "others", "ways")
    }
    text = run_text(capsys, *export(home, tmp_path / "adapter", "peft", "--base-name", "me/tiny", *LOOSE))
    assert "ungated" in text
    assert f"written as peft in {tmp_path / 'adapter'}, without the gate" in text
    assert 'base_model: "me/tiny"' in (tmp_path / "adapter" / "README.md").read_text()
    # The merged folder is a model as any other.
    assert run_json(capsys, "generate", "--model", str(tmp_path / "merged"), "--device", "cpu", "By trade, she is a")


def test_too_much_lost_is_exit_code_1(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = ["--max-perplexity-ratio", "0.1"]
    text = run_text(capsys, *export(home, tmp_path / "out", "peft", *LOOSE, *strict), code=1)
    assert "nothing is written: too much is lost without the gate: perplexity_ratio is" in text
    assert "--force writes it all the same" in text
    assert list(tmp_path.iterdir()) == []
    data = run_json(capsys, *export(home, tmp_path / "out", "peft", *LOOSE, *strict), code=1)
    assert "(at most 0.1)" in data["refused"]
    run_json(capsys, *export(home, tmp_path / "out", "peft", *strict, "--force"))
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_what_is_written_is_the_edits(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    run_json(capsys, *export(home, tmp_path / "adapter", "peft", "--force"))
    base = tiny_model("llama")
    adapted = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    editor = Editor(tiny_model("llama"), None, edits=home / "edits")
    editor.model.coachhook.set_modes(["always"] * len(editor.hooks))
    torch.testing.assert_close(adapted, logits(editor.model), rtol=1e-5, atol=1e-5)


def test_bad_input(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "format must be one of ('peft', 'merged'), got 'gguf'" in fails(capsys, *export(home, out, "gguf"))
    assert "--format" in fails(capsys, "export", str(home / "edits"), str(out), *model(home))
    assert "is a folder that is not empty" in fails(capsys, *export(home, home / "model", "peft"))
    assert "is not a folder" in fails(capsys, *export(home, home / "facts.jsonl", "peft"))
    assert "holds no edit set" in fails(
        capsys, "export", str(home / "model"), str(out), *model(home), "--format", "peft"
    )
    for name, value in (("said-lost", "2"), ("others-changed", "nan"), ("perplexity-ratio", "-1")):
        assert "must be" in fails(capsys, *export(home, out, "peft", f"--max-{name}={value}"))
    assert "invalid float value" in fails(capsys, *export(home, out, "peft", "--max-said-lost", "some"))
    assert "must name a folder" in fails(capsys, *export(home, Path(), "peft")[:2], " ", *model(home))
    assert "--perplexity /dev/zero is a device" in fails(
        capsys, *export(home, out, "peft", "--perplexity", "/dev/zero")
    )
    stranger = tmp_path / "stranger"
    tiny_model("llama", seed=1).save_pretrained(stranger)
    for name in os.listdir(home / "model"):
        if "token" in name:
            (stranger / name).write_bytes((home / "model" / name).read_bytes())
    assert "another base model" in fails(capsys, *export(home, out, "peft", "--model", str(stranger)))
    assert not out.exists()


def test_the_limits_are_those_of_python() -> None:
    arguments: argparse.Namespace = build_parser().parse_args(["export", "a", "b", "--model", "m", "--format", "peft"])
    found = (arguments.max_said_lost, arguments.max_others_changed, arguments.max_perplexity_ratio)
    assert found == tuple(vars(Limits()).values())
