"""A model whose parts accelerate keeps on disk is edited and served as one that is all in memory, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from coachhook_fast import EditConfig, Editor, EditRequest, load_edits, load_model
from coachhook_fast.evaluate.inspect import inspect_prompt
from coachhook_fast.models.loading import fingerprint
from coachhook_fast.models.placement import held_parameter, input_device

PROMPT = "These days the home of Ada Vale is the city of"
ON_DISK = {"model.embed_tokens", "model.layers.1", "model.layers.3"}
PARTS = ("embed_tokens", *(f"layers.{layer}" for layer in range(5)), "norm", "rotary_emb")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama", dtype=torch.float64).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def offloaded(folder: Path) -> Any:
    names = [*(f"model.{part}" for part in PARTS), "lm_head"]
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        device_map={name: "disk" if name in ON_DISK else "cpu" for name in names},
        offload_folder=folder.parent / "offloaded",
    )


def edited(model: Any, out: Path) -> dict[str, Tensor]:
    tokenizer = tiny_tokenizer()
    config = EditConfig(
        layers=(1, 2), v_num_grad_steps=4, context_tokens=3, threshold_keys=64, stats_sequence_length=32,
        max_batch_tokens=128, mom2_update_weight=5.0, threshold_edit_share=0.3,
    )  # fmt: skip
    editor = Editor(model, tokenizer, config)
    editor.collect_statistics(tiny_texts(12), progress=False)
    editor.edit([EditRequest(**fact) for fact in tiny_facts(5)], progress=False)
    editor.save_pretrained(out)
    tensors = {f"delta.{layer}": delta.dense() for layer, delta in enumerate(editor.edit_set.deltas)}
    editor.unload()
    load_edits(model, out)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    tensors["norm"] = inspect_prompt(model, tokenizer, PROMPT).norm
    with torch.no_grad():
        tensors |= {"logits": model(ids).logits, "text": model.generate(ids, max_new_tokens=6, do_sample=False)}
    return tensors


@pytest.mark.filterwarnings("ignore::coachhook_fast.editing.outcomes.EditWarning")
def test_parts_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, model in (("disk", offloaded(folder)), ("memory", load_model(str(folder), dtype="float64")[0])):
        monkeypatch.setenv("COACHHOOK_CACHE", str(folder.parent / f"cache-{name}"))
        assert (next(model.parameters()).device.type == "meta") == (name == "disk")
        found[name] = edited(model, folder.parent / f"edits-{name}")
    for key, value in found["memory"].items():
        assert torch.equal(found["disk"][key], value), key
    assert found["memory"]["norm"].max() > 0


def test_what_a_stand_in_stands_for(folder: Path) -> None:
    whole, parts = load_model(str(folder), dtype="float64")[0], offloaded(folder)
    assert fingerprint(parts) == fingerprint(whole)
    assert input_device(parts) == torch.device("cpu")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(held_parameter(parts, name, parts.get_parameter(name)), whole.get_parameter(name))


def test_auto_device(folder: Path) -> None:
    """There may be one device only: what is tested is that the model arrives whole."""
    model, _ = load_model(str(folder), device="auto")
    assert fingerprint(model) == fingerprint(load_model(str(folder), device="cpu")[0])


def test_edited_blocks_elsewhere_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(str(folder))
    monkeypatch.setattr(
        "coachhook_fast.hooks.layer.serving_placement", lambda *_: (torch.float32, torch.device("meta"))
    )
    with pytest.raises(ValueError, match="edited block 1 computes on meta, the model's inputs are on cpu"):
        Editor(model, tokenizer, EditConfig(layers=(1, 2)))
    assert not hasattr(model, "coachhook")


def test_tied_parameters_count_once_wherever_they_are() -> None:
    from accelerate import cpu_offload

    whole = tiny_model("qwen2")
    name = fingerprint(whole)
    assert fingerprint(cpu_offload(tiny_model("qwen2"), execution_device="cpu")) == name
    untied = tiny_model("llama")
    assert fingerprint(cpu_offload(tiny_model("llama"), execution_device="cpu")) == fingerprint(untied)


def test_devices_that_are_not_there_are_told_before_anything_is_read() -> None:
    for device in ("warp", "cuda:99", "cpu:-1", ""):
        with pytest.raises(ValueError, match=f"model 'nowhere' on device '{device}'"):
            load_model("nowhere", device=device)
