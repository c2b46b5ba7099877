"""`coachhook profile`: costs of an edit set on a model of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from editor_cases import make
from tiny import tiny_facts, tiny_model, tiny_tokenizer

from coachhook_fast import EditRequest
from coachhook_fast.bench.profile import profile, write_png
from coachhook_fast.cli import main


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "edits"
    editor = make()
    editor.edit([EditRequest(fact["prompt"], fact["subject"], fact["target_new"]) for fact in tiny_facts(3)])
    editor.save_pretrained(folder)
    return folder


def test_every_pass_has_both_sides_and_the_model_is_left_alone(edits: Path) -> None:
    model = make().unload()
    before = model(torch.tensor([[1, 2, 3]])).logits
    found = profile(model, tiny_tokenizer(), edits, batches=(1, 2), prompt_tokens=6, seconds=0.01)
    assert [(cost.work, cost.batch, cost.tokens) for cost in found.costs] == [
        ("prefill", 1, 6), ("decode step", 1, 7), ("prefill", 2, 6), ("decode step", 2, 7),
    ]  # fmt: skip
    for cost in found.costs:
        assert cost.ratio > 0
        for side in (cost.unedited, cost.edited):
            assert 0 < side.p20 <= side.seconds <= side.p80
            assert side.peak_bytes > 0
    assert found.edits == 3
    assert found.held_bytes > 0
    assert 0 < found.firing <= 1  # the edits' own prompts
    assert not hasattr(model, "coachhook")
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)


def test_text_at_which_nothing_fires(edits: Path) -> None:
    found = profile(make().unload(), tiny_tokenizer(), edits, text=" the", batches=(1,), prompt_tokens=4, seconds=0.01)
    assert found.firing == 0


def test_a_chart(edits: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = profile(make().unload(), tiny_tokenizer(), edits, batches=(1,), prompt_tokens=4, seconds=0.01)
    write_png(found, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "value"), [("batches", ()), ("batches", (0,)), ("prompt_tokens", 0), ("seconds", 0.0)]
)
def test_bad_numbers_are_named(edits: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        profile(tiny_model("llama"), tiny_tokenizer(), edits, **{name: value})  # type: ignore[arg-type]


def test_a_text_without_tokens_is_refused(edits: Path) -> None:
    model = make().unload()
    with pytest.raises(ValueError, match="text"):
        profile(model, tiny_tokenizer(), edits, text="")
    assert not hasattr(model, "coachhook")


def test_the_command_line(
    edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    make().unload().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    quick = ["--batch", "1", "--prompt-tokens", "4", "--seconds", "1"]
    assert main(["profile", *model, "--edits", str(edits), *quick]) == 0
    assert "decode step" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["profile", *model, "--edits", str(edits), "--batch", "1,none"])
    assert end.value.code == 2
    assert "none" in capsys.readouterr().err
