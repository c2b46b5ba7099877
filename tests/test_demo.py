"""The demo ends as the README says, on a tiny model: the first command that somebody runs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny import tiny_facts, tiny_model, tiny_tokenizer

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo.py"


@pytest.mark.slow
def test_the_demo_runs_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    records = [
        {
            **fact,
            "rephrase_prompts": [f"People say that {fact['subject']} is"],
            "same_subject": [{"prompt": f"The home of {fact['subject']} is", "answer": "Oslo"}],
            "locality_prompts": ["These days the weather is"],
        }
        for fact in tiny_facts(2)
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"--model": tmp_path / "model", "--facts": tmp_path / "facts.jsonl", "--out": tmp_path / "out"}
    monkeypatch.setattr(sys, "argv", [str(DEMO), *(str(part) for pair in options.items() for part in pair)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(DEMO), run_name="__main__")
    shown = capsys.readouterr().out
    assert end.value.code == 0, shown
    for score in ("reliability", "same_subject", "leak_passing", "fact_score"):
        assert score in shown
