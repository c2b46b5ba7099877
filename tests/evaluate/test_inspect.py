"""The token view: it shows what the forward pass really did, and leaves the model as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import tiny_model, tiny_tokenizer

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.evaluate.inspect import Inspection, as_table, inspect_prompt, visible, write_html, write_png
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.models.architectures import layout_of

PROMPT = "Ada <Vale> & Bruno\nlive in Lund, $5 away"


def edited(gate: str, threshold: float, *, moments: tuple[float, float] | None = None) -> tuple[Any, Hooks]:
    """A tiny model with random rank-2 edits in blocks 1 and 3."""
    model = tiny_model("llama")
    handle = Hooks(model, layout_of(model), (1, 3), gate)
    torch.manual_seed(5)
    for hook in handle.hooks:
        update = torch.randn(hook.out_features, 2), torch.randn(hook.in_features, 2) / hook.in_features**0.5
        delta = LowRankDelta.zeros(hook.out_features, hook.in_features).append(*update)
        hook.set_delta(delta, threshold, moments=moments)
    return model, handle


def watched(model: Any, handle: Hooks, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys [T, d], what the hook added to the base's output [T, m]) of each layer."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(hook: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((args[0][0], (output - hook.base(args[0]))[0]))

    handles = [hook.register_forward_hook(keep) for hook in handle.hooks]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for one in handles:
        one.remove()
    return seen


@pytest.mark.parametrize(("gate", "threshold"), [("calibrated", 1.5), ("sequence", 1.0)])
def test_shows_what_forward_did(gate: str, threshold: float) -> None:
    model, handle = edited(gate, threshold, moments=(1.0, 0.25))
    tokenizer = tiny_tokenizer()
    found = inspect_prompt(model, tokenizer, PROMPT)
    ids = tokenizer(PROMPT)["input_ids"]
    assert list(found.ids) == ids
    assert "".join(found.tokens) == PROMPT
    assert (found.gate, found.layers, found.thresholds) == (gate, (1, 3), (threshold, threshold))
    for column, (hook, (keys, added)) in enumerate(zip(handle.hooks, watched(model, handle, ids), strict=True)):
        norms = (keys @ hook.get_delta_weight().T).norm(dim=-1)
        torch.testing.assert_close(found.norm[:, column], norms.double(), rtol=1e-5, atol=1e-6)
        expected = (norms - 1.0) / 0.25 if gate == "calibrated" else (norms - norms.mean()) / norms.std()
        torch.testing.assert_close(found.z[:, column], expected.double(), rtol=1e-4, atol=1e-4)
        assert torch.equal(found.fire[:, column], added.norm(dim=-1) > 0)
    assert torch.equal(found.level >= 1, found.fire)
    assert found.fire.any()
    assert not found.fire.all()


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_leaves_the_model_as_it_was(gate: str) -> None:
    model, handle = edited(gate, 1.0)
    ids = torch.tensor([tiny_tokenizer()(PROMPT)["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        inspect_prompt(model, tiny_tokenizer(), PROMPT)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(not hook._forward_pre_hooks for hook in handle.hooks)


def test_json_has_null_for_what_is_not_a_number() -> None:
    model, _ = edited("calibrated", float("inf"))
    data = inspect_prompt(model, tiny_tokenizer(), "Ada Vale").to_dict()
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text)["thresholds"] == [None, None]
    assert data["tokens"][0]["z"] == [None, None]
    assert data["tokens"][0]["fire"] == [False, False]
    assert len(data["tokens"][0]["norm"]) == 2


def test_views(tmp_path: Path) -> None:
    model, _ = edited("calibrated", 1.5, moments=(1.0, 0.25))
    found = inspect_prompt(model, tiny_tokenizer(), PROMPT)
    console = Console(width=120, record=True, file=None, force_terminal=True, color_system="truecolor", quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(as_table(found))
    shown = capture.get()
    assert "layer 1" in shown
    assert "τ 1.5" in shown
    assert "●" in shown
    assert "\x1b[" in shown  # colours

    write_html(found, tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert "&lt;" in page
    assert "<Vale>" not in page
    assert page.count('class="fire"') == int(found.fire.sum())
    assert "src=" not in page
    assert "href=" not in page


def test_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = edited("sequence", 1.0)
    found = inspect_prompt(model, tiny_tokenizer(), PROMPT)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
        with pytest.raises(ValueError, match=r"pip install 'coachhook-fast\[plot\]'"):
            write_png(found, tmp_path / "view.png")
    pytest.importorskip("matplotlib")
    write_png(found, tmp_path / "view.png")
    assert (tmp_path / "view.png").read_bytes().startswith(b"\x89PNG")


def test_visible() -> None:
    assert visible(" a\nb\\n") == "·a\\nb\\\\n"
    assert visible("\x1b[2J\u202e\ud800") == r"\x1b[2J\u202e\ud800"


def test_nothing_in_a_prompt_is_obeyed_where_it_is_shown(tmp_path: Path) -> None:
    evil = "\x1b]0;t\x07\x9b31m\u202eab\ud800\r"
    one = torch.ones(1, 1)
    found = Inspection(evil, (evil,), (3,), "calibrated", (1,), (1.0,), one, one, one.bool())
    write_html(found, tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    cells = "".join(str(cell) for cell in as_table(found).columns[0].cells)
    for shown in (page, cells):
        assert not set(evil) & set(shown) & set("\x1b\x07\x9b\u202e\ud800\r")
        assert r"\x1b]0;t\x07\x9b31m\u202eab\ud800\r" in shown


def test_bad_input() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="model has no edits"):
        inspect_prompt(tiny_model("llama"), tokenizer, "x")
    model, _ = edited("calibrated", 1.0)
    with pytest.raises(ValueError, match="prompt has no tokens: ''"):
        inspect_prompt(model, tokenizer, "")
    with pytest.raises(ValueError, match="prompt has 300 tokens, the model's context is 256"):
        inspect_prompt(model, tokenizer, "!" * 300)


def test_level_is_one_at_the_threshold() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    shared: dict[str, Any] = {"prompt": "x", "tokens": ("x",), "ids": (1,), "layers": (0,), "thresholds": (2.0,)}
    calibrated = Inspection(gate="calibrated", norm=2 * one, z=one, fire=one > 0, **shared)
    sequence = Inspection(gate="sequence", norm=one, z=2 * one, fire=one > 0, **shared)
    assert float(calibrated.level) == float(sequence.level) == 1.0


def test_relative_thresholds_are_shown_as_what_they_are(tmp_path: Path) -> None:
    model, handle = edited("calibrated", 1.0)
    for hook in handle.hooks:
        hook.set_delta(hook.delta, 0.2, relative=True)
    tokenizer = tiny_tokenizer()
    found = inspect_prompt(model, tokenizer, PROMPT)
    assert found.relative
    for column, (hook, (keys, added)) in enumerate(
        zip(handle.hooks, watched(model, handle, list(found.ids)), strict=True)
    ):
        share = (keys @ hook.get_delta_weight().T).norm(dim=-1) / keys.norm(dim=-1)
        torch.testing.assert_close(found.norm[:, column], share.to(found.norm), rtol=1e-5, atol=1e-6)
        assert torch.equal(found.fire[:, column], added.abs().amax(-1) > 0)
    assert torch.equal(found.level >= 1, found.fire)
    assert found.to_dict()["relative"] is True
    write_html(found, tmp_path / "view.html")
    assert not inspect_prompt(edited("calibrated", 1.0)[0], tokenizer, PROMPT).relative
    assert "A cell holds ‖Δk‖ / ‖k‖ and z" in (tmp_path / "view.html").read_text(encoding="utf-8")
