"""PEFT's adapters and edits on one model, put on and taken off in any order: nothing is renamed, hidden or lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, edit, facts, logits, make
from tiny import tiny_model, tiny_tokenizer
from torch import nn

from coachhook_fast import Editor, HookLinear, load_edits
from coachhook_fast.hooks.hooks import hooks_of
from coachhook_fast.models.loading import fingerprint

peft = pytest.importorskip("peft")

FAMILIES = ("llama", "gpt2")  # nn.Linear and Conv1D
LORA = {"all-linear": "all-linear", "attention": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(family, folder of an edit set of its tiny model)"""
    folder = tmp_path_factory.mktemp("edits")
    editor = make(request.param, CONFIG.replace(threshold_z=0.5))
    edit(editor, facts(2))
    editor.save_pretrained(folder)
    return request.param, folder


def plain(family: str) -> Any:
    return tiny_model(family)


def edited(case: tuple[str, Path]) -> Any:
    return load_edits(plain(case[0]), case[1])


def with_lora(model: Any, targets: Any = "all-linear") -> Any:
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return adapted


TEXT = facts(1)[0].text


def says(model: Any) -> torch.Tensor:
    return logits(model, TEXT)


def test_the_edits_change_what_is_said(case: tuple[str, Path]) -> None:
    assert not torch.equal(says(edited(case)), says(plain(case[0])))


def test_an_adapter_on_an_edited_model_is_that_of_the_base_model(case: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = case
    adapted = with_lora(edited(case))
    assert (
        adapted.peft_config["default"].target_modules == with_lora(plain(family)).peft_config["default"].target_modules
    )
    expected = says(adapted)
    adapted.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == sum("lora_" in name for name, _ in adapted.named_parameters())
    first = load_edits(peft.PeftModel.from_pretrained(plain(family), tmp_path), folder)
    second = peft.PeftModel.from_pretrained(edited(case), tmp_path)
    for model in (first, second):
        assert torch.equal(says(model), expected)
        with model.disable_adapter():
            assert torch.equal(says(model), says(edited(case)))
    with hooks_of(first).disabled():  # type: ignore[union-attr]
        assert torch.equal(says(first), says(peft.PeftModel.from_pretrained(plain(family), tmp_path)))


@pytest.mark.parametrize("order", ["edits first", "adapter first"])
def test_merging_and_unloading_beside_hooks(case: tuple[str, Path], order: str) -> None:
    family, folder = case
    model = with_lora(edited(case)) if order == "edits first" else load_edits(with_lora(plain(family)), folder)
    beside = with_lora(plain(family))
    expected = says(model)
    unloaded = copy.deepcopy(model).unload()
    assert torch.equal(says(unloaded), says(edited(case)))
    assert torch.equal(says(unloaded.coachhook.unload()), says(plain(family)))
    merged = model.merge_and_unload()
    torch.testing.assert_close(says(merged), expected, rtol=1e-3, atol=1e-3)
    assert sum(isinstance(module, HookLinear) for module in merged.modules()) == 2
    merged.coachhook.unload()
    assert not any(isinstance(module, HookLinear) for module in merged.modules())
    assert torch.equal(says(merged), says(beside.merge_and_unload()))


def test_merged_and_unmerged_in_place(case: tuple[str, Path]) -> None:
    model = with_lora(edited(case))
    expected = says(model)
    model.merge_adapter()
    torch.testing.assert_close(says(model), expected, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(says(model), expected, rtol=1e-3, atol=1e-3)


def test_unloading_the_edits_leaves_the_adapter(case: tuple[str, Path]) -> None:
    model, alone = load_edits(with_lora(plain(case[0])), case[1]), with_lora(plain(case[0]))
    model.coachhook.unload()
    assert torch.equal(says(model), says(alone))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in alone.named_modules()]


def test_adapters_do_not_enter_the_fingerprint(case: tuple[str, Path]) -> None:
    own = fingerprint(plain(case[0]))
    for model in (
        edited(case),
        with_lora(plain(case[0])),
        with_lora(edited(case)),
        with_lora(edited(case)).base_model.model,
    ):
        assert fingerprint(model) == own
    head = peft.LoraConfig(target_modules="all-linear", r=2, modules_to_save=["lm_head"])
    assert fingerprint(peft.get_peft_model(plain(case[0]), head)) == own
    model = with_lora(plain(case[0]))
    model.merge_adapter()
    assert fingerprint(model) != own
    with pytest.raises(ValueError, match=r"edits belong to another base model.*has other values"):
        load_edits(model, case[1])


def test_a_trained_copy_of_an_edited_layer_is_refused(case: tuple[str, Path]) -> None:
    down = {"llama": "down_proj", "gpt2": "mlp.c_proj"}[case[0]]
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, modules_to_save=[down])
    model = peft.get_peft_model(plain(case[0]), config)
    with pytest.raises(ValueError, match="is trained as a copy by PEFT"):
        load_edits(model, case[1])
    assert hooks_of(model) is None


def test_editing_is_refused_while_an_adapter_takes_part() -> None:
    with pytest.raises(ValueError, match=r"PEFT adapters that are active or merged \(default\): merge_and_unload"):
        Editor(with_lora(plain("llama")), tiny_tokenizer(), CONFIG)
    editor = make()
    model = with_lora(editor.model, LORA["attention"])
    with pytest.raises(ValueError, match=r"PEFT adapters that are active or merged"):
        edit(editor, facts(1))
    assert editor.edit_set.num_edits == 0
    model.base_model.disable_adapter_layers()
    edit(editor, facts(1))
    alone = make()
    edit(alone, facts(1))
    assert torch.equal(says(model), says(alone.model))


def test_training_an_adapter_beside_edits_leaves_them_and_the_base_alone() -> None:
    editor = make()
    edit(editor, facts(2))
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    model = with_lora(editor.model, LORA["attention"]).train()
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    model.eval().unload()
    after = editor.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_of_an_edited_model_with_an_adapter(case: tuple[str, Path]) -> None:
    model = with_lora(edited(case))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(says(other), says(model))
        hooks = [module for module in other.modules() if isinstance(module, HookLinear)]
        assert len(hooks) == 2
        assert all(hook.weight is hook.base.weight for hook in hooks)
        assert isinstance(hooks[0], nn.Linear) == (case[0] == "llama")
