"""Editor and EditConfig: what is refused, by name, before anything is changed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, assert_same, edit, facts, make, snapshot
from store_cases import tensors_of, with_tensors
from tiny import tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, Editor, EditRequest, EditWarning


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

    def test_statistics_of_too_little_text(self) -> None:
        editor = make()
        with pytest.raises(ValueError, match=r"taken from \d+ tokens \(text of many more .* positive definite"):
            editor.collect_statistics(tiny_texts(1), max_tokens=12, progress=False)

    def test_a_prompt_longer_than_the_context(self) -> None:
        editor = make()
        with pytest.raises(ValueError, match=r"requests\[0\].prompt takes \d+ tokens .* the model's context is 256"):
            editor.edit([EditRequest("word " * 200 + "{} is a", "Ada", "baker")], progress=False)
        assert editor.hooks[0].delta.rank == 0

    def test_weak_edits_warn(self) -> None:
        editor = make(config=CONFIG.replace(mom2_update_weight=1e7))
        with pytest.warns(EditWarning, match=r"did not go in: \d+% of its residual is left"):
            editor.edit(facts(1), progress=False)


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
    with pytest.raises(ValueError, match=r"threshold_edit_share must be a share of at most 1, got 1.5"):
        EditConfig(threshold_edit_share=1.5)
    file = tmp_path / "memit.yaml"
    file.write_text("alg_name: MEMIT\nlayers: [3, 4]\nv_lr: 0.5\nclamp_norm_factor: 0.75\nmom2_n_samples: 100000\n")
    assert EditConfig.from_yaml(file) == EditConfig(layers=(3, 4), v_lr=0.5, clamp_norm_factor=0.75)
    # as EasyEdit writes numbers, which YAML 1.1 takes for text
    file.write_text("v_lr: 5e-1\nv_weight_decay: 1e-3\nmom2_update_weight: 1.5e4\nv_loss_layer: 31\n")
    assert EditConfig.from_yaml(file) == EditConfig(v_lr=0.5, v_weight_decay=1e-3, mom2_update_weight=15_000.0)
    file.write_text("v_lr: fast\n")
    with pytest.raises(TypeError, match="v_lr must be a number, got 'fast'"):
        EditConfig.from_yaml(file)


@pytest.mark.parametrize("layers", [(True,), (1.0,), ("1",), (), (-1,)])
def test_config_refuses_what_is_no_layer(layers: Any) -> None:
    with pytest.raises(ValueError, match="layers must be one or more block numbers"):
        EditConfig(layers=layers)


@pytest.mark.parametrize("requests", [None, EditRequest("{} is", "Ada", "x"), "Ada is", 3])
def test_a_batch_is_a_list(requests: Any) -> None:
    with pytest.raises(TypeError, match="requests must be a list of EditRequest, got"):
        make().edit(requests)


def test_damaged_cache_files_are_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    first = make()
    monkeypatch.setattr("coachhook_fast.editing.editor.TargetCache.discard", lambda self: None)
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 10_000_000)}, "layers must be under 10000"),
        ({"context_tokens": 1_000_000}, "context_tokens must be at most"),
        ({"v_num_grad_steps": 10**9}, "v_num_grad_steps must be at most"),
        ({"context_seeds": ("The",) * 2_000}, "context_seeds may hold"),
        ({"rewrite_module_tmp": "a.{}.{0.__class__}"}, "rewrite_module_tmp must be"),
    ],
)
def test_settings_out_of_bounds_are_refused_before_anything_is_made(changes: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        Editor(model, tiny_tokenizer(), CONFIG.replace(**changes))
    assert not hasattr(model, "coachhook")


def test_edits_of_other_sizes_are_refused_by_their_files_headers(tmp_path: Path) -> None:
    """Before a tensor is read, as load_edits does."""
    editor = make()
    edit(editor, facts(1))
    editor.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path, "weights")
    with_tensors(tmp_path, "weights", {**tensors, "0.B": torch.zeros(tensors["0.B"].shape[0], 9_999)})
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"0\.B has shape \[\d+, 9999\], the model's layer needs"):
        Editor(model, tiny_tokenizer(), edits=tmp_path)
    assert not hasattr(model, "coachhook")


def test_settings_files_are_read_by_the_one_reader(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(ValueError, match=r"settings\.yaml has 2147483648 bytes"):
        EditConfig.from_yaml(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"settings\.yaml is a FIFO"):
        EditConfig.from_yaml(path)
    path.unlink()
    path.write_text("[" * 5_000)
    with pytest.raises(ValueError, match=r"settings\.yaml is (nested too deeply|not YAML)"):
        EditConfig.from_yaml(path)
