"""`coachhook verify-vllm` without vLLM: what it makes of the tokens that a mode reports. The real one: tests/vllm."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_cases import edits, fails, model, run_json, run_text

from coachhook_fast.cli import verify_vllm
from coachhook_fast.integrations.vllm_modes import NEW_TOKENS, certain_tokens


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for vLLM: modes answer as transformers does, but those named here as told."""
    told: dict[str, Any] = {}
    certain: list[list[int]] = []

    def reading(served_model: Any, ids: Sequence[int]) -> list[int]:
        certain.append(certain_tokens(served_model, ids))
        return certain[-1]

    def answering(mode: str, folder: str, edit_set: str, prompts: Sequence[Sequence[int]]) -> Any:
        assert Path(folder).is_dir()
        assert Path(edit_set).is_dir()
        if isinstance(told.get(mode), Exception):
            raise told[mode]
        answers = [[*tokens, *[0] * (NEW_TOKENS - len(tokens))] for tokens in certain[-len(prompts) :]]
        if told.get(mode) is not None:
            answers[told[mode]][0] += 1
        return {"first": answers, "again": answers}, ""

    find = importlib.util.find_spec
    here = SimpleNamespace(origin="here")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: here if name == "vllm" else find(name, *rest))
    monkeypatch.setattr(verify_vllm, "certain_tokens", reading)
    monkeypatch.setattr(verify_vllm, "run_mode", answering)
    return told


def test_equal_tokens_agree(home: Path, capsys: pytest.CaptureFixture[str], served: dict[str, Any]) -> None:
    data = run_json(capsys, "verify-vllm", *model(home), *edits(home))
    assert data["agree"]
    assert {row["prompts"] for row in data["modes"]} == {4}
    assert all(row["tokens"] > 0 for row in data["modes"])
    assert "eager" in run_text(capsys, "verify-vllm", *model(home), *edits(home), "--mode", "eager")


def test_a_mode_that_differs_or_fails(home: Path, capsys: pytest.CaptureFixture[str], served: dict[str, Any]) -> None:
    served.update({"eager": 2, "compiled": RuntimeError("no compiler\nlong log")})
    arguments = ["verify-vllm", *model(home), *edits(home), "--mode", "eager", "--mode", "compiled"]
    data = run_json(capsys, *arguments, code=1)
    assert not data["agree"]
    assert data["modes"][0]["different"] == [2]
    assert data["modes"][1]["error"].startswith("no compiler")
    text = run_text(capsys, *arguments, code=1)
    assert "prompts [2] differ" in text
    assert "compiled" in text
    assert "long log" not in text


def test_a_mode_that_hangs_leaves_the_others(
    home: Path, capsys: pytest.CaptureFixture[str], served: dict[str, Any]
) -> None:
    served["eager"] = subprocess.TimeoutExpired("python", 600)
    arguments = ["verify-vllm", *model(home), *edits(home), "--mode", "eager", "--mode", "compiled"]
    eager, compiled = run_json(capsys, *arguments, code=1)["modes"]
    assert "timed out after 600 seconds" in eager["error"]
    assert compiled["different"] == []


def test_heads_that_two_ranks_cannot_share(
    home: Path, capsys: pytest.CaptureFixture[str], served: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "9 attention heads" in verify_vllm._unshareable(SimpleNamespace(num_attention_heads=9))
    assert verify_vllm._unshareable(SimpleNamespace(num_attention_heads=12)) == ""
    monkeypatch.setattr(verify_vllm, "_unshareable", lambda config: "9 heads")
    arguments = ["verify-vllm", *model(home), *edits(home), "--mode", "tensor parallel"]
    data = run_json(capsys, *arguments, code=1)
    assert data["modes"][0]["skipped"] == "9 heads"
    assert not data["agree"]  # nothing was compared
    assert run_json(capsys, *arguments, "--mode", "eager")["agree"]


def test_without_vllm(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec("vllm")
    if found is not None and found.origin is not None:
        pytest.skip("vLLM is here")
    assert "pip install 'coachhook-fast[vllm]'" in fails(capsys, "verify-vllm", *model(home), *edits(home))
