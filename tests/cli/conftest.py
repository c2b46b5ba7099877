"""A model folder, a fact file and an edit set of two batches, made by the command line itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_cases import QUICK, facts, model, out
from tiny import tiny_facts, tiny_model, tiny_tokenizer

from coachhook_fast.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, a fact file and an edit set of two batches."""
    home = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    neighbours = [f"{fact['subject']} is" for fact in tiny_facts(8, seed=1)]
    lines = [
        {**fact, "rephrase_prompts": [f"People say that {fact['subject']} is"], "locality_prompts": [neighbour]}
        for fact, neighbour in zip(tiny_facts(6), neighbours, strict=False)
    ]
    (home / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(home / "cache"))
        code = main(
            ["edit", *model(home), *facts(home), *QUICK, "--batch-size", "2", "--limit", "4", *out(home, "edits")]
        )
    assert code == 0
    return home


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(home / "cache"))
