"""A subject at the attention sink is edited behind other text only, is reported, and spoils nothing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, Editor, EditRequest, EditWarning
from coachhook_fast.editing.sinks import away_from_sinks
from coachhook_fast.editing.targets.rows import TargetRows
from coachhook_fast.edits import store as edit_store
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.passes.forward import PartialModel, frozen

CONFIG = EditConfig(
    layers=(1, 2), v_num_grad_steps=6, v_lr=0.3, mom2_update_weight=5.0, context_tokens=3, threshold_keys=64,
    stats_sequence_length=48, threshold_rule="zscore", threshold_z=1.0,
)  # fmt: skip
SINKING = EditRequest("Q works as a", "Q", "pilot")
ORDINARY = EditRequest("Yesterday Z was born in", "Z", "Oslo")


def model_with_a_sink() -> Any:
    """A tiny model whose first block makes the hidden state of every text's first token long."""
    model = tiny_model("llama")

    def lengthen(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[2]
        hidden = output[0] if isinstance(output, tuple) else output
        # One direction for every first token, as in real models.
        ramp = torch.linspace(-1, 1, hidden.shape[-1]) * 10 * hidden.norm(dim=-1).mean()
        hidden = torch.where((positions == 0)[..., None], 0.1 * hidden + ramp, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model.model.layers[0].register_forward_hook(lengthen, with_kwargs=True)
    return model


def test_rows_at_the_sink_are_replaced() -> None:
    model, tokenizer = model_with_a_sink(), tiny_tokenizer()
    contexts = ("The old town", "{} is known for", "A text about {} says")
    batch = [request.tokenise(tokenizer, contexts) for request in (SINKING, ORDINARY)]
    with frozen(model):
        moved = away_from_sinks(PartialModel(model, layout_of(model)), 2, batch, pad_id=0, max_tokens=100)
    first, second, third, bare = batch[0].rows
    assert bare.lookup == second.lookup == 0
    assert moved[0].rows == (first, first, third, first)
    assert moved[0].in_context_only
    assert moved[1].rows[0] == batch[1].rows[0]
    assert moved[1].rows[1] == batch[1].rows[0]  # "Z is known for" opens with the subject too
    assert moved[1].bare == batch[1].bare
    assert not moved[1].in_context_only


def test_other_rows_at_the_sink_are_left_out() -> None:
    model, tokenizer = model_with_a_sink(), tiny_tokenizer()
    row, sunk = ORDINARY.tokenise(tokenizer, ()).bare, SINKING.tokenise(tokenizer, ()).bare
    tokens = replace(ORDINARY.tokenise(tokenizer, ()), paraphrases=(sunk, row), keep=(row, sunk), held=(sunk,))
    with frozen(model):
        moved = away_from_sinks(PartialModel(model, layout_of(model)), 2, [tokens], pad_id=0, max_tokens=100)[0]
    assert (moved.paraphrases, moved.keep, moved.held) == ((row,), (row,), ())
    assert moved.bare == row
    assert not moved.in_context_only


def test_a_replaced_row_counts_once() -> None:
    """The row that stands in for the bare prompt is a context too: its continuation must not weigh twice."""
    model, tokenizer = model_with_a_sink(), tiny_tokenizer()
    batch = [SINKING.tokenise(tokenizer, ("The old town", "{} is known for", "A text about {} says"))]
    partial = PartialModel(model, layout_of(model))
    with frozen(model):
        moved = away_from_sinks(partial, 2, batch, pad_id=0, max_tokens=100)
        rows = TargetRows.build(partial, 2, moved, CONFIG.replace(continuation_factor=0.5), 0, False)
    assert rows.fixed_weights.tolist() == [0.5, CONFIG.kl_factor]


def test_a_model_without_a_sink_keeps_its_rows() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    batch = [request.tokenise(tokenizer, ("The old town", "{} is")) for request in (SINKING, ORDINARY)]
    with frozen(model):
        assert away_from_sinks(PartialModel(model, layout_of(model)), 2, batch, pad_id=0, max_tokens=100) == batch


def test_the_edit_is_reported_and_saved(tmp_path: Path) -> None:
    editor = Editor(model_with_a_sink(), tiny_tokenizer(), CONFIG)
    editor.collect_statistics(tiny_texts(12), progress=False)
    with pytest.warns(EditWarning, match="holds only where text precedes the subject: 'Q'"):
        batch = editor.edit([SINKING], progress=False)
    assert batch.outcomes[0].in_context_only
    editor.save_pretrained(tmp_path)
    assert edit_store.load(tmp_path).batches[0].outcomes[0].in_context_only
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = editor.edit([ORDINARY], progress=False)
    assert not batch.outcomes[0].in_context_only
    assert not any("attention sink" in str(warning.message) for warning in caught)
