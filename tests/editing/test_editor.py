"""Editor: every family and dtype, saving and going on, checkpoints, statistics."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editor_cases import CONFIG, edit, facts, logits, make, snapshot
from tiny import FAMILIES, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import Editor, EditRequest, EditWarning, HookLinear, load_edits
from coachhook_fast.editing.calibration import calibrate
from coachhook_fast.edits import store
from coachhook_fast.models.architectures import Layout


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_edits(family: str) -> None:
    # Strong edits, keys of the bare prompt alone and a gate that lets nearly all pass: then V must be reached.
    open_gate = {"threshold_rule": "fpr", "threshold_fpr": 0.99, "context_seeds": (), "subject_templates": ()}
    editor = make(family, CONFIG.replace(mom2_update_weight=0.01, clamp_norm_factor=0.75, **open_gate))
    before = {name: value.clone() for name, value in editor.model.named_parameters()}
    clean = logits(editor.model)
    batch = edit(editor, facts(3))
    # Gemma's norm after the FFN fixes the length of what a layer adds, so V is reached less exactly there.
    assert max(outcome.residual_left for outcome in batch.outcomes) < (0.3 if family.startswith("gemma") else 0.15)
    assert not torch.equal(logits(editor.model), clean)
    assert all(len(outcome.leverage) == 2 and min(outcome.leverage) > 0 for outcome in batch.outcomes)
    with editor.disabled():
        assert torch.equal(logits(editor.model), clean)
    for name, value in editor.model.named_parameters():
        assert torch.equal(value, before[name])
    model = editor.unload()
    assert not any(isinstance(module, HookLinear) for module in model.modules())
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_dtype(family: str, dtype: torch.dtype) -> None:
    editor = make(family, dtype=dtype)
    clean = logits(editor.model)
    edit(editor, facts(2))
    assert editor.edit_set.deltas[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert editor.hooks[0].delta.dtype == dtype
    after = logits(editor.model, facts(1)[0].text)
    assert torch.isfinite(after).all()
    with editor.disabled():
        assert torch.equal(logits(editor.model), clean)


def test_tied_embeddings_stay_tied() -> None:
    editor = make("qwen2")
    edit(editor, facts(2))
    assert editor.model.get_input_embeddings().weight is editor.model.get_output_embeddings().weight


def test_unknown_architectures_name_their_modules() -> None:
    model = tiny_model("llama")
    model.config.model_type = "novel"
    model.model.layers[2].mlp.second = torch.nn.Linear(45, 24)  # or its structure would show them
    with pytest.raises(ValueError, match=r"architecture 'novel' is not known .* layer_module_tmp='model.layers.\{\}'"):
        Editor(model, tiny_tokenizer(), CONFIG)
    templates = {"layer_module_tmp": "model.layers.{}", "rewrite_module_tmp": "model.layers.{}.mlp.down_proj"}
    with pytest.raises(ValueError, match=r"rewrite_module_tmp must be a module path with one '\{\}'"):
        Editor(model, tiny_tokenizer(), CONFIG.replace(layer_module_tmp="model.layers.{}"))
    with pytest.raises(ValueError, match=r"rewrite_module_tmp 'model.layers.\{\}.mlp.nothing' names no module"):
        Editor(
            model,
            tiny_tokenizer(),
            CONFIG.replace(**{**templates, "rewrite_module_tmp": "model.layers.{}.mlp.nothing"}),
        )
    editor = Editor(model, tiny_tokenizer(), CONFIG.replace(**templates))
    editor.collect_statistics(tiny_texts(12), progress=False)
    assert edit(editor, facts(2)).outcomes


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_the_residual_left_is_that_of_the_published_hooks(gate: str) -> None:
    """Under `sequence` the standing α keeps everything out until it is lowered at the end of the batch."""
    editor = make(config=CONFIG.replace(gate=gate, alpha=50.0))
    requests, seen = facts(3), {}

    def outputs() -> torch.Tensor:
        found = []
        for request in requests:
            row = request.tokenise(editor.tokenizer, []).bare
            with torch.no_grad():
                hidden = editor.model(torch.tensor([row.prompt]), output_hidden_states=True).hidden_states
            found.append(hidden[editor.layers[-1] + 1][0, row.lookup])
        return torch.stack(found, dim=1)

    before = outputs()
    batch = edit(editor, requests, observer=lambda event, _, **tensors: seen.update({event: tensors}))
    values = seen["values"]["V"]
    left = (values - outputs()).norm(dim=0) / (values - before).norm(dim=0)
    assert [outcome.residual_left for outcome in batch.outcomes] == pytest.approx(left.tolist(), rel=1e-3)
    assert max(left) < 0.9


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_saving_and_going_on_equals_never_having_stopped(gate: str, tmp_path: Path) -> None:
    config = CONFIG.replace(gate=gate)
    editor = make(config=config)
    edit(editor, facts(2))
    editor.save_pretrained(tmp_path)

    fresh = load_edits(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(fresh), logits(editor.model))

    resumed = Editor(tiny_model("llama"), tiny_tokenizer(), edits=tmp_path)
    assert resumed.config == editor.config
    resumed.collect_statistics(tiny_texts(12), progress=False)
    edit(resumed, facts(2, seed=1))
    edit(editor, facts(2, seed=1))
    for one, other in zip(snapshot(resumed), snapshot(editor), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_going_on_with_another_threshold_rule_calibrates_all_layers_anew(tmp_path: Path) -> None:
    config = CONFIG.replace(round_robin=2, threshold_rule="edit_keys", threshold_edit_share=0.5)
    editor = make(config=config)
    edit(editor, facts(2))
    second = edit(editor, facts(2, seed=1))
    editor.save_pretrained(tmp_path)
    before = [threshold.value for threshold in editor.edit_set.thresholds]

    changed = config.replace(threshold_edit_share=0.9)
    later = Editor(tiny_model("llama"), tiny_tokenizer(), changed, edits=tmp_path)
    assert [hook.threshold for hook in later.hooks] == pytest.approx(before)  # until there are statistics
    later.collect_statistics(tiny_texts(12), progress=False)
    wanted = [
        calibrate(delta, later.statistics.samples[layer], later.edit_set.edit_keys(at), later.config).value
        for at, (layer, delta) in enumerate(zip(later.layers, later.edit_set.deltas, strict=True))
    ]
    assert all(new > old for new, old in zip(wanted, before, strict=True))
    assert [hook.threshold for hook in later.hooks] == pytest.approx(wanted)
    later.rollback(second.id)  # what the ledger knew was of the old rule
    rest = later.edit_set
    again = [
        calibrate(delta, later.statistics.samples[layer], rest.edit_keys(at), later.config)
        for at, (layer, delta) in enumerate(zip(later.layers, rest.deltas, strict=True))
    ]
    assert [threshold.value for threshold in rest.thresholds] == pytest.approx([one.value for one in again])

    # saved without a batch more, the set has the thresholds that its config names
    unedited = Editor(tiny_model("llama"), tiny_tokenizer(), changed, edits=tmp_path)
    unedited.save_pretrained(tmp_path / "saved")
    saved = store.load(tmp_path / "saved")
    assert saved.config.threshold_edit_share == 0.9
    assert [threshold.value for threshold in saved.thresholds] == pytest.approx(wanted)
    assert [threshold.value for threshold in saved.batches[-1].thresholds] == pytest.approx(wanted)


def test_keys_of_loaded_and_of_fresh_batches_are_read_together() -> None:
    """Batches that were loaded lie on the CPU, the layer on its device: here the meta device stands for a GPU."""
    editor = make()
    loaded, fresh = edit(editor, facts(2)), edit(editor, facts(1, seed=1))
    deltas = (editor.edit_set.deltas[0].to(device="meta"), *editor.edit_set.deltas[1:])
    both = replace(editor.edit_set, deltas=deltas, batches=(loaded, fresh))
    assert both.edit_keys(0).shape == (editor.key_dim, 3)
    assert both.edit_keys(0).device.type == "meta"


def test_an_edit_set_of_another_model_or_setting_is_refused(tmp_path: Path) -> None:
    editor = make()
    edit(editor, facts(2))
    editor.save_pretrained(tmp_path)
    other = tiny_model("llama", seed=9)
    with pytest.raises(ValueError, match="edits belong to another base model"):
        load_edits(other, tmp_path)
    assert not hasattr(other, "coachhook")
    with pytest.raises(ValueError, match="edits belong to another base model"):
        Editor(other, tiny_tokenizer(), edits=tmp_path)
    assert not any(isinstance(module, HookLinear) for module in other.modules())
    with pytest.raises(ValueError, match=r"mom2_update_weight is 7.0, but the edits to go on from were made with 5.0"):
        Editor(tiny_model("llama"), tiny_tokenizer(), CONFIG.replace(mom2_update_weight=7.0), edits=tmp_path)


def test_bf16_serves_what_fp32_edited(tmp_path: Path) -> None:
    editor = make()
    edit(editor, facts(2))
    editor.save_pretrained(tmp_path)
    model = tiny_model("llama").to(torch.bfloat16)
    load_edits(model, tmp_path)
    assert model.coachhook.hooks[0].delta.dtype == torch.bfloat16


def test_one_subject_twice_in_a_batch_goes_in_where_the_plain_update_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [EditRequest("{} works as a", "Ada Vale", "pilot"), EditRequest("{} was born in", "Ada Vale", "Oslo")]
    open_gate = {"threshold_rule": "fpr", "threshold_fpr": 0.99, "context_seeds": (), "subject_templates": ()}
    config = CONFIG.replace(mom2_update_weight=0.01, clamp_norm_factor=0.75, **open_gate)

    def residual_left() -> float:
        return max(outcome.residual_left for outcome in edit(make(config=config), pair).outcomes)

    merged = residual_left()
    monkeypatch.setattr(
        "coachhook_fast.editing.targets.optimise.by_subject", lambda batch: [[i] for i in range(len(batch))]
    )
    plain = residual_left()
    assert merged < 0.15
    assert plain > 0.4  # one key cannot have two values: each gets the mean


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_of_an_edited_model_is_its_bases(family: str, tmp_path: Path) -> None:
    editor, base = make(family), tiny_model(family)
    edit(editor, facts(2))
    tensors = editor.model.state_dict()
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        name: tuple(value.shape) for name, value in base.state_dict().items()
    }
    editor.model.save_pretrained(tmp_path)
    loaded = type(editor.model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(base))
    before = logits(editor.model)
    editor.model.load_state_dict(base.state_dict())
    assert torch.equal(logits(editor.model), before)


def test_going_on_without_a_corpus_takes_the_first_ones_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    editor = make()
    edit(editor, facts(2))
    editor.save_pretrained(tmp_path / "edits")
    assert editor.statistics is not None
    later = Editor(tiny_model("llama"), tiny_tokenizer(), edits=tmp_path / "edits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(later.collect_statistics(progress=False).moments[1], editor.statistics.moments[1])
    other = Editor(tiny_model("llama"), tiny_tokenizer(), edits=tmp_path / "edits")
    with pytest.warns(EditWarning, match="made with other key statistics"):
        other.collect_statistics(tiny_texts(20)[12:], progress=False)


def test_statistics_with_and_without_bos_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    found = [
        Editor(tiny_model("llama"), tiny_tokenizer(bos=bos), CONFIG).collect_statistics(tiny_texts(6), progress=False)
        for bos in (True, False)
    ]
    assert found[0].tokens > found[1].tokens  # a BOS before every sequence
    assert not torch.equal(found[0].moments[1], found[1].moments[1])


def test_layouts_reach_every_block() -> None:
    layout = Layout("model.layers.{}", "model.layers.{}.mlp.down_proj")
    assert len(layout.blocks(tiny_model("llama"))) == 5
