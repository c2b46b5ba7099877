"""Editing on a GPU: batches, edit sets and undo against the same on the CPU, and target values by CUDA graphs.

`make gpu-check` runs it. The models are tiny and random; both sides take their own key statistics.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, TEXT, edit, facts, make
from tiny import tiny_model, tiny_tokenizer

from coachhook_fast import EditConfig, Editor
from coachhook_fast.editing.keys import bare_outputs
from coachhook_fast.editing.targets.optimise import Target, optimise
from coachhook_fast.editing.targets.recorded import RecordedStep
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.passes.forward import PartialModel, frozen

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CONTEXTS = ["Therefore the rain", "Because of", "I"]
# fp32 rounding on both sides, through three batches of Adam steps and solves.
LOOSE = 2e-2


def edited(device: str, cache: Path, monkeypatch: pytest.MonkeyPatch, family: str, config: EditConfig) -> Editor:
    """Three batches; a cache of its own, for key statistics are cached by what the model is, not where."""
    monkeypatch.setenv("COACHHOOK_CACHE", str(cache / device))
    editor = make(family, config, device=device)
    for start in (0, 3, 6):
        edit(editor, facts(9)[start : start + 3])
    return editor


def deltas(editor: Editor) -> list[torch.Tensor]:
    return [hook.get_delta_weight().cpu() for hook in editor.hooks]


@torch.no_grad()
def answers(editor: Editor) -> torch.Tensor:
    """[texts, V] logits after each prompt, on the CPU."""
    tokenizer = tiny_tokenizer()
    texts = [TEXT, *(request.text for request in facts(9))]
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=editor.partial.device)
        found.append(editor.model(ids).logits[0, -1].cpu())
    return torch.stack(found)


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize(("family", "groups"), [("gpt2", 1), ("gptj", 1), ("gemma3", 1), ("llama", 1), ("llama", 2)])
def test_batches_are_those_of_the_cpu(
    family: str, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.replace(round_robin=groups)
    ours = edited(DEVICE, tmp_path, monkeypatch, family, config)
    twin = edited("cpu", tmp_path, monkeypatch, family, config)
    assert ours.edit_set.contexts == twin.edit_set.contexts
    assert ours.statistics is not None
    assert twin.statistics is not None
    assert_close(list(ours.statistics.moments.values()), list(twin.statistics.moments.values()), 1e-4)
    assert_close(deltas(ours), deltas(twin), LOOSE)
    for one, other in zip(ours.hooks, twin.hooks, strict=True):
        assert one.threshold == pytest.approx(other.threshold, rel=2 * LOOSE)
    for one, other in zip(ours.ledger, twin.ledger, strict=True):
        assert [o.steps for o in one.outcomes] == [o.steps for o in other.outcomes]
        assert [o.loss for o in one.outcomes] == pytest.approx([o.loss for o in other.outcomes], rel=LOOSE)
    assert_close([answers(ours)], [answers(twin)], LOOSE)
    with ours.disabled(), twin.disabled():
        assert_close([answers(ours)], [answers(twin)], 1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_edit_set_is_saved_loaded_and_gone_on_from(
    groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.replace(round_robin=groups)
    editor = edited(DEVICE, tmp_path, monkeypatch, "llama", config)
    before, held = answers(editor), deltas(editor)
    editor.save_pretrained(tmp_path / "edits")
    model = editor.unload()
    second: Any = Editor(model, tiny_tokenizer(), edits=tmp_path / "edits")
    torch.testing.assert_close(answers(second), before, rtol=1e-5, atol=1e-5)
    batch = edit(second, facts(12)[9:])
    assert len(second.ledger) == 4
    assert any(not torch.equal(one, other) for one, other in zip(deltas(second), held, strict=True))
    second.rollback(batch.id)
    assert_close(deltas(second), held, 1e-4)
    second.rollback(second.ledger[0].id)
    assert len(second.ledger) == 2
    assert torch.isfinite(answers(second)).all()
    base = tiny_model("llama", device=DEVICE)
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]], device=DEVICE)
    with torch.no_grad():
        assert torch.equal(second.unload()(ids).logits, base(ids).logits)


def targets(family: str, dtype: torch.dtype, *, graphs: bool, hook: Any = None) -> list[Target]:
    """Some stop early, others do not at all."""
    model, tokenizer = tiny_model(family, dtype=dtype, device=DEVICE), tiny_tokenizer()
    config = EditConfig(v_lr=0.5, v_num_grad_steps=12, v_loss_threshold=6.8, clamp_norm_factor=4.0)
    partial = PartialModel(model, layout_of(model))
    if hook is not None:
        partial.blocks[-1].register_forward_hook(hook)
    batch = [request.tokenise(tokenizer, CONTEXTS) for request in facts(8)]
    with frozen(model):
        v0 = bare_outputs(partial, 2, batch, pad_id=0, max_tokens=400)
        return optimise(partial, 2, batch, v0, config, pad_id=0, whole_rows=False, graphs=graphs)


def assert_same_targets(found: list[Target], expected: list[Target], tolerance: float) -> None:
    assert [one.steps for one in found] == [other.steps for other in expected]
    for one, other in zip(found, expected, strict=True):
        assert float((one.value - other.value).norm() / other.value.norm()) < tolerance


@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "gemma2", "gemma3"])
def test_steps_as_cuda_graphs_give_the_same(family: str, shrinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # In fp64 Gemma 2's masks overflow its fp32 softmax: rows of padding become NaN.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    expected = targets(family, dtype, graphs=False)
    assert len({target.steps for target in expected}) > 1
    replayed: list[bool] = []
    real = RecordedStep._replay

    def replay(step: RecordedStep) -> torch.Tensor:
        replayed.append(step._graph is not None)
        return real(step)

    monkeypatch.setattr(RecordedStep, "_replay", replay)
    monkeypatch.setattr(RecordedStep, "worth_shrinking", lambda step, share, _: shrinks and share > 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a step could not be recorded")
        found = targets(family, dtype, graphs=True)
    assert replayed
    assert all(replayed)
    # Models whose softmax is fp32 whatever their dtype round there.
    assert_same_targets(found, expected, 1e-3 if family in ("gptj", "gemma2", "gemma3") else 1e-8)


def test_half_precision_is_recorded_too() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a step could not be recorded")
        found = targets("llama", torch.bfloat16, graphs=True)
    assert all(bool(torch.isfinite(target.value).all()) for target in found)


def test_a_step_that_waits_for_the_device_goes_on_as_it_is() -> None:
    """The last test: what a failed recording leaves behind would show in others."""

    def waits(*_: Any) -> None:
        torch.ones(1, device=DEVICE).item()

    expected = targets("llama", torch.float64, graphs=False)
    with pytest.warns(UserWarning, match="could not be recorded"):
        found = targets("llama", torch.float64, graphs=True, hook=waits)
    assert_same_targets(found, expected, 1e-8)
    assert torch.isfinite(torch.randn(3, device=DEVICE)).all()  # the generator is not left as if recorded
    assert_same_targets(targets("llama", torch.float64, graphs=True), expected, 1e-8)
