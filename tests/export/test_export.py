"""Exports say what the model without a gate says: as PEFT loads the adapter, as transformers loads the checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, TEXT, edit, facts, logits, make, raising
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from coachhook_fast import Editor, export_edits
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.evaluate import HeldOut
from coachhook_fast.export import ExportLosses, Limits, Served, TooMuchLostError, default_held_out
from coachhook_fast.export.others import other_prompts

FAMILIES = ("llama", "gpt2", "qwen2")  # nn.Linear, Conv1D, tied embeddings
HELD_OUT = HeldOut("The baker of Lund met the pilot of Graz at the old market. Nobody had seen so much snow.")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def editor(request: pytest.FixtureRequest) -> Editor:
    """Two batches of different layers in round-robin, so that ranks differ."""
    editor = make(request.param)
    edit(editor, facts(3))
    edit(editor, [facts(5)[4]])
    return editor


def export(editor: Editor, folder: Path, format: str, **options: Any) -> ExportLosses:
    return export_edits(editor, folder, format=format, held_out=HELD_OUT, force=True, **options)


def ungated(editor: Editor, text: str = TEXT) -> torch.Tensor:
    editor.model.coachhook.set_modes(["always"] * len(editor.hooks))
    try:
        return logits(editor.model, text)
    finally:
        editor.enable()


def family_of(editor: Editor) -> str:
    return str(editor.model.config.model_type)


# -------------------------------------------------------------------- both formats


def test_peft_loads_the_adapter(editor: Editor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    export(editor, tmp_path / "adapter", "peft", base_name="tiny")
    base = tiny_model(family_of(editor))
    plain = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = logits(adapted)
    torch.testing.assert_close(found, ungated(editor), **CLOSE)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), found, **CLOSE)


def test_the_adapter_is_one_rank_in_peft_s_names(editor: Editor, tmp_path: Path) -> None:
    """And holds Δ itself: alpha is the rank."""
    export(editor, tmp_path / "adapter", "peft", base_name="tiny")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    rank = max(delta.rank for delta in editor.edit_set.deltas)
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (rank, rank, "tiny")
    assert config["fan_in_fan_out"] == (family_of(editor) == "gpt2")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(config["target_modules"])
    for path, delta in zip(config["target_modules"], editor.edit_set.deltas, strict=True):
        editor.model.get_submodule(path)
        down, up = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        assert down.shape[0] == up.shape[1] == rank
        torch.testing.assert_close(up @ down, delta.dense())


def test_ranks_that_differ_are_filled_up(tmp_path: Path) -> None:
    editor = make("llama")
    edit(editor, facts(3))
    first, second = editor.edit_set.deltas
    less = LowRankDelta(first.U[:, :1], first.B[:1])  # type: ignore[index]
    editor.edit_set = replace(editor.edit_set, deltas=(less, second))
    editor.model.coachhook.publish(editor.edit_set)
    peft = pytest.importorskip("peft")
    export(editor, tmp_path / "adapter", "peft")
    adapted = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), ungated(editor), **CLOSE)


def test_transformers_loads_the_checkpoint(editor: Editor, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    gated = logits(editor.model)
    export(editor, tmp_path / "merged", "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), ungated(editor), **CLOSE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer(TEXT)["input_ids"] == editor.tokenizer(TEXT)["input_ids"]
    assert all(torch.equal(value, before[name]) for name, value in editor.model.state_dict().items())
    assert torch.equal(logits(editor.model), gated)


def test_half_precision_is_measured_as_it_is_written(tmp_path: Path) -> None:
    editor = make("llama", dtype=torch.bfloat16)
    edit(editor, facts(2))
    losses = export(editor, tmp_path / "merged", "merged")
    assert losses.merged is not None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16
    loaded.to(torch.bfloat16)  # the rotary frequencies too, as those of the tiny model are
    assert losses.exported.perplexity == pytest.approx(HELD_OUT.perplexity(loaded, editor.tokenizer), rel=1e-6)
    assert export(editor, tmp_path / "adapter", "peft").merged is None


def test_the_sequence_gate(tmp_path: Path) -> None:
    editor = make("llama", CONFIG.replace(gate="sequence"))
    edit(editor, facts(2))
    export(editor, tmp_path / "merged", "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), ungated(editor), **CLOSE)


def test_training_mode_comes_back(editor: Editor, tmp_path: Path) -> None:
    editor.model.train()
    try:
        export(editor, tmp_path / "merged", "merged")
        assert editor.model.training
    finally:
        editor.model.eval()


# -------------------------------------------------------------------- what is lost


def test_the_figures_are_of_the_ways_of_serving(editor: Editor, tmp_path: Path) -> None:
    losses = export(editor, tmp_path / "out", "peft")
    with editor.disabled():
        assert losses.unedited.perplexity == HELD_OUT.perplexity(editor.model, editor.tokenizer)
    assert losses.gated.perplexity == HELD_OUT.perplexity(editor.model, editor.tokenizer)
    editor.model.coachhook.set_modes(["always"] * len(editor.hooks))
    assert losses.ungated.perplexity == HELD_OUT.perplexity(editor.model, editor.tokenizer)
    editor.enable()
    assert losses.gated.said == tuple(fact.said for fact in editor.check())
    assert len(losses.gated.others) == len(other_prompts([one for batch in editor.ledger for one in batch.requests]))
    record = json.loads((tmp_path / "out" / "coachhook_export.json").read_text())
    assert record["ways"] == losses.rows()
    assert record["base_fingerprint"] == editor.edit_set.model
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"| {losses.ungated.perplexity:.3f} |" in page
    assert not any(fact.subject in page for fact in facts(5))


def served(said: str, others: str, perplexity: float) -> Served:
    return Served(tuple(map(bool, map(int, said))), tuple((int(one),) for one in others), perplexity)


def test_losses_count_what_the_gate_had_kept() -> None:
    losses = ExportLosses(served("0000", "1234", 10.0), served("1110", "1239", 10.1), served("1001", "1255", 10.4))
    assert losses.said_lost == pytest.approx(2 / 3)
    assert losses.others_changed == pytest.approx(1 / 3)
    assert losses.perplexity_ratio == pytest.approx(1.04)
    losses.check(Limits(0.7, 0.4, 1.05))
    with pytest.raises(TooMuchLostError, match=r"said_lost is 0.667 \(at most 0.5\), perplexity_ratio is 1.040"):
        losses.check(Limits(0.5, 0.4, 1.01))


@pytest.mark.parametrize("perplexity", [float("nan"), float("inf")])
def test_a_broken_model_is_over_every_limit(perplexity: float) -> None:
    losses = ExportLosses(served("", "", 10.0), served("", "", 10.0), served("", "", perplexity))
    assert losses.said_lost == 0
    with pytest.raises(TooMuchLostError, match="perplexity_ratio"):
        losses.check(Limits(1, 1, 1e9))
    json.dumps(losses.to_dict(), allow_nan=False)


def test_other_prompts_are_of_no_edit() -> None:
    requests = facts(4)
    texts = other_prompts(requests)
    assert not {request.text for request in requests} & {*texts}
    assert len(texts) == len({*texts}) == 4 * 4
    assert len(other_prompts(facts(12) * 100)) <= 4 * 250
    assert other_prompts([]) == []


def test_the_default_text_is_there(editor: Editor) -> None:
    assert default_held_out().perplexity(editor.model, editor.tokenizer) > 1


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_too_much_lost_writes_nothing(editor: Editor, tmp_path: Path, format: str) -> None:
    limits = Limits(perplexity_ratio=0.5)
    with pytest.raises(TooMuchLostError, match=r"perplexity_ratio is \d.* \(at most 0.5\)") as caught:
        export_edits(editor, tmp_path / "out", format=format, held_out=HELD_OUT, limits=limits)
    assert caught.value.losses.perplexity_ratio > 0.5
    assert list(tmp_path.iterdir()) == []
    assert editor.model.coachhook.modes == ["gated"] * len(editor.hooks)
    export_edits(editor, tmp_path / "out", format=format, held_out=HELD_OUT, limits=limits, force=True)
    assert "although more was lost" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_nothing_half_written_is_left(
    editor: Editor, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = logits(editor.model)
    monkeypatch.setattr("coachhook_fast.export.exporting.card", raising(OSError))  # after the tensors
    with pytest.raises(OSError):
        export(editor, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(editor.model), gated)


def test_arguments_are_refused_before_anything_is_measured(
    editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coachhook_fast.export.exporting.measure_losses", raising(AssertionError))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match=r"format must be one of .*, got 'gguf'"):
        export(editor, tmp_path / "out", "gguf")
    with pytest.raises(ValueError, match="is a folder that is not empty"):
        export(editor, tmp_path / "full", "peft")
    with pytest.raises(ValueError, match="is not a folder"):
        export(editor, tmp_path / "full" / "file", "peft")
    for wrong in ({"said_lost": 1.5}, {"others_changed": -1}, {"perplexity_ratio": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            Limits(**wrong)
    empty = make("llama")
    for format in ("peft", "merged"):
        with pytest.raises(ValueError, match="there is nothing to export"):
            export(empty, tmp_path / "out", format)


def test_edits_that_fill_their_weight_are_no_adapter(tmp_path: Path) -> None:
    editor = make("llama")
    edit(editor, facts(2))
    dense = tuple(LowRankDelta(None, delta.dense()) for delta in editor.edit_set.deltas)
    editor.edit_set = replace(editor.edit_set, deltas=dense)
    editor.model.coachhook.publish(editor.edit_set)
    with pytest.raises(ValueError, match="format must be 'merged' for these edits"):
        export(editor, tmp_path / "adapter", "peft")
    export(editor, tmp_path / "merged", "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), ungated(editor), **CLOSE)


class _Packed(nn.Linear):
    """A layer whose weight is not what its forward multiplies with, as a quantiser's is."""


def test_bases_that_nothing_can_be_merged_into(tmp_path: Path) -> None:
    editor = make("llama")
    edit(editor, facts(2))
    block = editor.model.model.layers
    base = editor.hooks[0].base
    base.__class__ = _Packed
    with pytest.raises(ValueError, match=r"format must be 'peft' for this model, got 'merged': the _Packed of block 1"):
        export(editor, tmp_path / "out", "merged")
    base.__class__ = nn.Linear
    block[3].mlp.down_proj.weight = base.weight
    with pytest.raises(ValueError, match=r"the weight of block 1 is tied \(.*layers\.1.*layers\.3"):
        export(editor, tmp_path / "out", "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_within_peft_s_wrapper(tmp_path: Path, family: str) -> None:
    """Adapters that are switched off: the edits are of the base, and its names are those of the export."""
    peft = pytest.importorskip("peft")
    plain = make(family)
    edit(plain, facts(2))
    plain.save_pretrained(tmp_path / "edits")
    wrapped = peft.get_peft_model(tiny_model(family), peft.LoraConfig(target_modules="all-linear", r=2)).eval()
    wrapped.base_model.disable_adapter_layers()
    editor = Editor(wrapped, plain.tokenizer, edits=tmp_path / "edits")
    with pytest.raises(ValueError, match="has a PEFT adapter beside it"):
        export(editor, tmp_path / "merged", "merged")
    export(editor, tmp_path / "adapter", "peft")
    adapted = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), ungated(plain), **CLOSE)


def test_a_compiled_base(tmp_path: Path) -> None:
    plain = make("llama")
    edit(plain, facts(2))
    plain.save_pretrained(tmp_path / "edits")
    editor = Editor(torch.compile(tiny_model("llama"), backend="eager"), plain.tokenizer, edits=tmp_path / "edits")
    export(editor, tmp_path / "merged", "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), ungated(plain), **CLOSE)


def test_a_sum_that_does_not_fit_the_dtype(tmp_path: Path) -> None:
    editor = make("llama", dtype=torch.float16)
    edit(editor, facts(2))
    with torch.no_grad():
        editor.hooks[0].base.weight[0, 0] = 65504
    first, *rest = editor.edit_set.deltas
    large = LowRankDelta(first.U, first.B * 1e8)
    editor.edit_set = replace(editor.edit_set, deltas=(large, *rest))
    editor.model.coachhook._versions.change(lambda _, entry: replace(entry, edit_set=editor.edit_set))
    with pytest.raises(ValueError, match=r"W \+ Δ of block 1 does not fit torch.float16"):
        export(editor, tmp_path / "out", "merged")
    assert list(tmp_path.iterdir()) == []
