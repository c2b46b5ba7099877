"""What strangers wrote into an edit set, facts or a prompt: neither terminal nor rich nor browser obeys it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from cli_cases import edits, fails, model, out, run_text
from tiny import tiny_facts

from coachhook_fast.cli import main

EVIL = "\x1b[2J\x1b]8;;http://evil\x07x\x1b]0;t\x07\x9b31m\0\u202eab\u2066\ud800[red]y[/red]\x08[link=http://evil]z[/]"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff]")
COLOURS = re.compile("\x1b\\[[0-9;]*m")


@pytest.fixture(params=["pipe", "terminal"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "400")
    return str(request.param)


def assert_harmless(text: str) -> None:
    assert OBEYED.findall(COLOURS.sub("", text)) == []
    text.encode()


@pytest.fixture
def evil(home: Path, tmp_path: Path) -> Path:
    """The edit set with evil words wherever a ledger holds text."""
    shutil.copytree(home / "edits", tmp_path / "edits")
    path = tmp_path / "edits" / "edit_set.json"
    manifest = json.loads(path.read_text())
    manifest["model"] = EVIL
    parent = None
    for number, batch in enumerate(manifest["batches"]):
        batch |= {"id": f"{number}{EVIL}", "parent": parent, "time": EVIL}
        parent = batch["id"]
        for outcome in batch["outcomes"]:
            whole = EVIL.replace("\ud800", "")  # half a character is refused in a request
            outcome["request"] |= {"subject": whole, "prompt": f"{{}} {whole}", "target_new": whole, "case_id": whole}
    path.write_text(json.dumps(manifest))
    return tmp_path / "edits"


@pytest.mark.parametrize("arguments", [["log"], ["log", "--facts"], ["verify-edits"]], ids=" ".join)
def test_tables(evil: Path, capsys: pytest.CaptureFixture[str], kind: str, arguments: list[str]) -> None:
    where = [str(evil)] if arguments == ["verify-edits"] else ["--edits", str(evil)]
    shown = run_text(capsys, *arguments, *where)
    assert_harmless(shown)
    assert ("\x1b[" in shown) == (kind == "terminal")
    flat = re.sub(r"\s|[│┃]", "", COLOURS.sub("", shown))
    assert "[red]" in flat  # markup is text
    assert r"\x1b" in flat


def test_errors(
    home: Path, evil: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cases = [
        ["rollback", *model(home), "--edits", str(evil), EVIL.replace("\0", "")],
        ["generate", *model(home), "--edits", str(evil), "x"],
        ["generate", "--model", str(home / "model"), "--device", EVIL.replace("\0", ""), "x"],
        ["log", "--edits", f"nothing{EVIL}"],
        ["edit", *model(home), "--facts", f"{EVIL}", *out(home, "never")],
        ["edit", "--batch-size", EVIL],
        ["bench", EVIL],
    ]
    for arguments in cases:
        assert_harmless(fails(capsys, *arguments).rstrip("\n"))


def test_facts_that_are_left_out(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, bad = tiny_facts(2)
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, [{**bad, "subject": EVIL, "prompt": EVIL[1:]}, good])))
    arguments = ["eval", *model(home), "--facts", str(path), "--metrics", "accuracy"]
    assert_harmless(fails(capsys, *arguments))
    assert main([*arguments, "--skip-invalid"]) == 0
    captured = capsys.readouterr()
    assert_harmless(captured.out)
    assert "left out 1 facts" in captured.err


def test_a_prompt_in_the_table_and_on_the_page(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    prompt = EVIL.replace("\ud800", "") + "<script>alert(1)</script>"
    page = tmp_path / "page.html"
    shown = run_text(capsys, "inspect", *model(home), *edits(home), "--html", str(page), prompt)
    assert_harmless(shown)
    written = page.read_text(encoding="utf-8")
    assert_harmless(written)
    assert "<script" not in written
    assert r"\x1b" in written


def test_generated_text(home: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    prompt = EVIL.replace("\ud800", "")
    for more in ([], ["--compare"]):
        shown = run_text(capsys, "generate", *model(home), *edits(home), *more, prompt)
        assert_harmless(shown)
        assert "[red]y[/red]" in COLOURS.sub("", shown).replace("\n", "")
