"""Editor: every family and dtype, all-or-nothing batches, undo, saving and going on."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, Editor, EditRequest, EditWarning, HookLinear, load_edits
from coachhook_fast.architectures import Layout
from coachhook_fast.memory import KeyMemory

CONFIG = EditConfig(
    layers=(1, 2), v_num_grad_steps=6, v_lr=0.3, clamp_norm_factor=3.0, mom2_update_weight=5.0, context_tokens=3,
    context_seeds=("The", "You"), threshold_keys=64, stats_sequence_length=48, threshold_rule="zscore", threshold_z=2.0,
)  # fmt: skip
TEXT = "By trade, Clara Quill is a"


def make(family: str = "llama", config: EditConfig = CONFIG, **options: Any) -> Editor:
    editor = Editor(tiny_model(family, **options), tiny_tokenizer(), config)
    editor.collect_statistics(tiny_texts(12), progress=False)
    return editor


def facts(n: int, seed: int = 0) -> list[EditRequest]:
    return [EditRequest(**fact) for fact in tiny_facts(n, seed=seed)]


def edit(editor: Editor, requests: list[EditRequest], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)  # six steps on a random model: residuals may stay
        return editor.edit(requests, progress=False, **options)


@torch.no_grad()
def logits(model: Any, text: str = TEXT) -> torch.Tensor:
    return model(torch.tensor([tiny_tokenizer()(text)["input_ids"]])).logits


def snapshot(editor: Editor) -> list[torch.Tensor]:
    return [
        *(memory.matrix() for memory in editor.memories),
        *(hook.get_delta_weight() for hook in editor.hooks),
        *(torch.tensor(hook.threshold) for hook in editor.hooks),
        logits(editor.model),
    ]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


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
    assert all(len(outcome.strength) == 2 and min(outcome.strength) > 0 for outcome in batch.outcomes)
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
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["solve", "late solve", "outcomes"])
def test_a_failed_batch_leaves_everything_as_it_was(
    gate: str, error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make(config=CONFIG.replace(gate=gate))
    edit(editor, facts(2))
    before, ledger = snapshot(editor), editor.ledger
    if where == "outcomes":
        monkeypatch.setattr("coachhook_fast.editor.outcomes_of", _raising(error))
    else:
        failing = editor.memories[1 if where == "late solve" else 0]
        monkeypatch.setattr(failing, "solve", _raising(error))
    with pytest.raises(error):
        edit(editor, facts(3, seed=1))
    monkeypatch.undo()
    assert_same(snapshot(editor), before)
    assert editor.ledger == ledger
    assert [hook.mode for hook in editor.hooks] == ["gated", "gated"]
    edit(editor, facts(3, seed=1))
    assert len(editor.ledger) == 2


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


def _raising(error: type[BaseException]) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_ctrl_c_during_the_commit_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    editor = make()
    real = KeyMemory.update

    def interrupted(self: KeyMemory, K: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        real(self, K)

    monkeypatch.setattr(KeyMemory, "update", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells start us with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            edit(editor, facts(2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(editor.ledger) == 1  # the batch went in whole before the interrupt took effect
    assert editor.hooks[0].delta.rank > 0


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_rolling_back_the_last_batch_gives_the_state_before_it(gate: str) -> None:
    editor = make(config=CONFIG.replace(gate=gate))
    edit(editor, facts(2))
    before = snapshot(editor)
    batch = edit(editor, facts(3, seed=1))
    assert not torch.equal(snapshot(editor)[-1], before[-1]) or not torch.equal(snapshot(editor)[2], before[2])
    editor.rollback(batch.id)
    after = snapshot(editor)
    for memory, wanted in zip(after[:2], before[:2], strict=True):
        torch.testing.assert_close(memory, wanted, rtol=1e-9, atol=1e-9)
    assert_same(after[2:], before[2:])
    with pytest.raises(ValueError, match=f"batch_id '{batch.id}' is not in the ledger"):
        editor.rollback(batch.id)


def test_rolling_back_a_batch_in_the_middle_leaves_the_others() -> None:
    editor = make()
    batches = [edit(editor, facts(2, seed=seed)) for seed in (0, 1, 2)]
    kept = [editor.edit_set.batches[0], editor.edit_set.batches[2]]
    editor.rollback(batches[1].id)
    for position, hook in enumerate(editor.hooks):
        wanted = sum(b.layers[position].residuals @ b.layers[position].directions.T for b in kept)
        torch.testing.assert_close(hook.get_delta_weight(), wanted, rtol=1e-4, atol=1e-5)
    for batch in kept:
        editor.rollback(batch.id)
    with editor.disabled():
        clean = logits(editor.model)
    assert torch.equal(logits(editor.model), clean)
    assert editor.hooks[0].delta.rank == 0


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
    monkeypatch.setattr("coachhook_fast.targets._merged", lambda batch, known: [[i] for i in range(len(batch))])
    plain = residual_left()
    assert merged < 0.15
    assert plain > 0.4  # one key cannot have two values: each gets the mean


def test_targets_found_before_an_interrupt_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(config=CONFIG.replace(max_batch_tokens=1))
    asked: list[int] = []
    from coachhook_fast import targets

    real = targets.TargetRows.build.__func__  # type: ignore[attr-defined]

    def build(cls: Any, *args: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(cls, *args)

    monkeypatch.setattr(targets.TargetRows, "build", classmethod(build))
    with pytest.raises(KeyboardInterrupt):
        edit(editor, facts(4))
    batch = edit(editor, facts(4))
    assert len(asked) == 3 + 2  # two were known
    untroubled = edit(make(config=CONFIG.replace(max_batch_tokens=1)), facts(4))
    for one, other in zip(batch.layers, untroubled.layers, strict=True):
        torch.testing.assert_close(one.residuals, other.residuals, rtol=1e-4, atol=1e-5)


class TestBadInput:
    def test_layers_out_of_range(self) -> None:
        model = tiny_model("llama")
        with pytest.raises(ValueError, match=r"layers \[9\] are out of range: the model has blocks 0 to 4"):
            Editor(model, tiny_tokenizer(), CONFIG.replace(layers=(1, 9)))
        assert not hasattr(model, "coachhook")

    def test_two_editors_on_one_model(self) -> None:
        editor = make()
        with pytest.raises(ValueError, match="already has hooks"):
            Editor(editor.model, tiny_tokenizer(), CONFIG)

    @pytest.mark.parametrize("budget", [0, -5, 1])
    def test_a_token_budget_without_tokens(self, budget: int) -> None:
        editor = make()
        with pytest.raises(ValueError, match=f"max_tokens must be at least 2, got {budget}"):
            editor.collect_statistics(tiny_texts(8), max_tokens=budget, progress=False)

    def test_statistics_of_another_model(self) -> None:
        with pytest.raises(ValueError, match="statistics are of another model"):
            make("gpt2").use_statistics(make().statistics)  # type: ignore[arg-type]

    def test_covariance_that_is_not_positive_definite(self) -> None:
        editor = make()
        statistics = copy.deepcopy(editor.statistics)
        assert statistics is not None
        statistics.moments[1] -= 2 * torch.eye(editor.key_dim) * statistics.moments[1].abs().max()
        memories = editor.memories
        with pytest.raises(ValueError, match="positive definite"):
            editor.use_statistics(statistics)
        statistics.moments[1][:] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            editor.use_statistics(statistics)
        assert editor.memories is memories

    def test_a_prompt_longer_than_the_context(self) -> None:
        editor = make()
        with pytest.raises(ValueError, match=r"requests\[0\].prompt takes \d+ tokens .* the model's context is 256"):
            editor.edit([EditRequest("word " * 200 + "{} is a", "Ada", "baker")], progress=False)
        assert editor.hooks[0].delta.rank == 0

    def test_weak_edits_warn(self) -> None:
        editor = make(config=CONFIG.replace(mom2_update_weight=1e7))
        with pytest.warns(EditWarning, match=r"did not go in: \d+% of its residual is left"):
            editor.edit(facts(1), progress=False)


def test_ctrl_c_within_a_forward_pass_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make()
    edit(editor, facts(2))
    before, solve = snapshot(editor), KeyMemory.solve
    seen: list[Any] = []

    def interrupting_solve(self: KeyMemory, keys: torch.Tensor) -> Any:
        if not seen:  # the next pass over the model, which reads the second layer's keys, is interrupted
            block = editor.model.model.layers[2]  # type: ignore[union-attr,index]
            seen.append(block.register_forward_pre_hook(_raising(KeyboardInterrupt)))
        return solve(self, keys)

    monkeypatch.setattr(KeyMemory, "solve", interrupting_solve)
    with pytest.raises(KeyboardInterrupt):
        edit(editor, facts(4)[2:])
    seen[0].remove()
    assert {hook.mode for hook in editor.hooks} == {"gated"}
    assert_same(snapshot(editor), before)
    edit(editor, facts(4)[2:])
    assert not torch.equal(logits(editor.model), before[-1])


def test_a_memory_that_fails_in_the_commit_takes_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(dtype=torch.float64)
    edit(editor, facts(2))
    before = snapshot(editor)
    monkeypatch.setattr(editor.memories[1], "update", _raising(MemoryError))
    with pytest.raises(MemoryError):
        edit(editor, facts(4)[2:])
    for one, other in zip(snapshot(editor), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert len(editor.ledger) == 1


def test_editing_while_disabled_goes_on_top_of_the_earlier_edits() -> None:
    one, other = make(), make()
    for editor in (one, other):
        edit(editor, facts(2))
    edit(one, facts(4)[2:])
    with other.disabled():
        edit(other, facts(4)[2:])
        assert {hook.mode for hook in other.hooks} == {"off"}
    assert_same(snapshot(one), snapshot(other))


def test_rollbacks_in_any_order_leave_the_same_thresholds() -> None:
    editors = make(), make()
    for editor, order in zip(editors, ((0, 2), (2, 0)), strict=True):
        ids = [edit(editor, facts(6)[start : start + 2]).id for start in (0, 2, 4)]
        for position in order:
            editor.rollback(ids[position])
    for one, other in zip(editors[0].hooks, editors[1].hooks, strict=True):
        torch.testing.assert_close(one.get_delta_weight(), other.get_delta_weight())
        assert one.threshold == pytest.approx(other.threshold, rel=1e-5)


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


def test_an_unloaded_editor_touches_no_other_editors_hooks() -> None:
    stale = make()
    model = stale.unload()
    editor = Editor(model, tiny_tokenizer(), CONFIG)
    for use in (stale.unload, lambda: stale.edit(facts(1)), lambda: stale.rollback("x")):
        with pytest.raises(ValueError, match="were unloaded"):
            use()
    assert model.coachhook.hooks == editor.hooks  # type: ignore[union-attr]


def test_editing_where_gradients_are_off() -> None:
    editor, other = make(), make()
    edit(other, facts(2))
    with torch.no_grad():
        edit(editor, facts(2))
    assert_same(snapshot(editor), snapshot(other))
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        edit(editor, facts(4)[2:])


@pytest.mark.parametrize("name", ["context_seeds", "subject_templates", "layers"])
def test_config_takes_lists_of_texts_not_a_text(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a list, got 'The \{{\}}'"):
        EditConfig(**{name: "The {}"})


def test_config_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown setting\(s\) \['v_learning_rate'\]"):
        EditConfig.from_dict({"v_learning_rate": 1})
    with pytest.raises(ValueError, match="layers must be ascending without repeats, got"):
        EditConfig(layers=(3, 2))
    with pytest.raises(TypeError, match=r"v_lr must be a number, got '0.5'"):
        EditConfig(v_lr="0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate must be one of"):
        EditConfig(gate="soft")
    with pytest.raises(ValueError, match=r"threshold_own must be a share of at most 1, got 1.5"):
        EditConfig(threshold_own=1.5)
    file = tmp_path / "memit.yaml"
    file.write_text("alg_name: MEMIT\nlayers: [3, 4]\nv_lr: 0.5\nclamp_norm_factor: 0.75\nmom2_n_samples: 100000\n")
    assert EditConfig.from_yaml(file) == EditConfig(layers=(3, 4), v_lr=0.5, clamp_norm_factor=0.75)


@pytest.mark.parametrize("layers", [(True,), (1.0,), ("1",), (), (-1,)])
def test_config_refuses_what_is_no_layer(layers: Any) -> None:
    with pytest.raises(ValueError, match="layers must be one or more block numbers"):
        EditConfig(layers=layers)


@pytest.mark.parametrize("requests", [None, EditRequest("{} is", "Ada", "x"), "Ada is", 3])
def test_a_batch_is_a_list(requests: Any) -> None:
    with pytest.raises(TypeError, match="requests must be a list of EditRequest, got"):
        make().edit(requests)


def test_statistics_with_and_without_bos_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    found = [
        Editor(tiny_model("llama"), tiny_tokenizer(bos=bos), CONFIG).collect_statistics(tiny_texts(6), progress=False)
        for bos in (True, False)
    ]
    assert found[0].tokens > found[1].tokens  # a BOS before every sequence
    assert not torch.equal(found[0].moments[1], found[1].moments[1])


def test_damaged_cache_files_are_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    first = make()
    monkeypatch.setattr("coachhook_fast.editor.TargetCache.discard", lambda self: None)
    wanted = edit(first, facts(2))
    cut = [path for path in tmp_path.rglob("*.safetensors") if path.parent.name in ("statistics", "targets")]
    assert len(cut) == 2
    for path in cut:
        path.write_bytes(path.read_bytes()[:-100])
    second = Editor(tiny_model("llama"), tiny_tokenizer(), CONFIG)
    with pytest.warns(UserWarning, match="the statistics are collected anew"):
        second.collect_statistics(tiny_texts(12), progress=False)
    found = edit(second, facts(2))
    assert_same([one.residuals for one in found.layers], [one.residuals for one in wanted.layers])


def test_layouts_reach_every_block() -> None:
    layout = Layout("model.layers.{}", "model.layers.{}.mlp.down_proj")
    assert len(layout.blocks(tiny_model("llama"))) == 5
