"""PartialModel: skipping, stopping and reading must change nothing of what the whole model computes."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny_model

from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.passes.block_masks import select_masks
from coachhook_fast.models.passes.forward import PartialModel, align_rows, frozen
from coachhook_fast.models.passes.prefix_cache import PrefixCache

ROWS = [[5, 9, 30, 41, 7, 8], [11, 12, 13], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71], [99]]
LOOKUPS = [2, 0, 9, 0]


def setup(family: str) -> tuple[PartialModel, object]:
    partial = PartialModel(model := tiny_model(family, dtype=torch.float32), layout_of(model))
    return partial, align_rows(ROWS, LOOKUPS, 0, torch.device("cpu"))


def test_rows_share_the_lookup_column() -> None:
    batch = align_rows(ROWS, LOOKUPS, 0, torch.device("cpu"))
    for index, (row, lookup) in enumerate(zip(ROWS, LOOKUPS, strict=True)):
        assert batch.input_ids[index, batch.lookup] == row[lookup]
        assert batch.input_ids[index][batch.attention_mask[index] == 1].tolist() == row
        assert batch.position_ids[index][batch.attention_mask[index] == 1].tolist() == list(range(len(row)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_resumed_and_cached_columns_give_the_whole_models_logits(family: str) -> None:
    partial, batch = setup(family)
    for last in (0, 2, len(partial.blocks) - 1):
        _, found = partial.run(batch.columns(0), until=last, outputs=[last])
        hidden = found.outputs[last]
        cache = PrefixCache.fill(partial, last, batch, hidden)
        result, _ = partial.run(
            batch.columns(batch.lookup), resume=(last, hidden[:, batch.lookup :]), **cache.options(partial.model)
        )
        for index, (row, lookup) in enumerate(zip(ROWS, LOOKUPS, strict=True)):
            alone = partial.model(torch.tensor([row])).logits[0, lookup:]
            torch.testing.assert_close(result.logits[index, : len(row) - lookup], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gathered_logits_are_those_positions() -> None:
    partial, batch = setup("gemma2")  # has a soft cap behind the head
    whole = partial.model(**batch.columns(0)).logits
    rows, columns = torch.tensor([2, 0, 2]), torch.tensor([4, 8, 11])
    with partial.gathered_logits(rows, columns):
        result, _ = partial.run(batch.columns(0))
    torch.testing.assert_close(result.logits[0], whole[rows, columns])
    assert partial.model(**batch.columns(0)).logits.shape == whole.shape  # the hook is gone


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masks_made_before_serve_as_those_of_the_pass(family: str) -> None:
    partial, batch = setup(family)
    inputs = batch.columns(0)
    whole = partial.model(**inputs).logits
    masks = partial.masks(inputs, torch.zeros(*batch.input_ids.shape, 1))
    assert masks is not None
    assert len(masks) == len(partial.blocks)
    result, _ = partial.run(inputs, masks=masks)
    torch.testing.assert_close(result.logits, whole, rtol=0, atol=0)
    kept = torch.tensor([0, 2])
    result, _ = partial.run(batch.select(kept).columns(0), masks=select_masks(masks, kept))
    torch.testing.assert_close(result.logits, whole[kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(partial.model(**inputs).logits, whole, rtol=0, atol=0)  # the hooks are gone


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ffns_without_padding_change_no_real_token(family: str) -> None:
    partial, batch = setup(family)
    real = batch.attention_mask
    seen: list[int] = []
    handle = partial.layout.down_projection(partial.model, 1).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2).shape[0])
    )
    whole = partial.model(**batch.columns(0)).logits
    result, _ = partial.run(batch.columns(0), places=batch.places())
    partial.model(**batch.columns(0))
    handle.remove()
    torch.testing.assert_close(result.logits[real == 1], whole[real == 1], rtol=1e-4, atol=1e-5)
    assert seen == [real.numel(), int(real.sum()), real.numel()]  # before, within and after
    assert int(real.sum()) < real.numel()
    assert batch.select(torch.tensor([2])).places(stop=12) is None  # that row has no padding
    with_keys = partial.run(batch.columns(0), keys=[1], outputs=[1], places=batch.places())[1]
    padded = partial.run(batch.columns(0), keys=[1], outputs=[1])[1]
    assert with_keys.keys[1].shape == padded.keys[1].shape  # where keys are kept nothing is taken out
    for kept, other in ((with_keys.keys[1], padded.keys[1]), (with_keys.outputs[1], padded.outputs[1])):
        torch.testing.assert_close(kept[real == 1], other[real == 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ffns_of_unknown_families_keep_their_padding() -> None:
    """They may look at other tokens, so nothing is taken out of their sight."""
    model = tiny_model("llama", dtype=torch.float32)
    model.config.model_type = "nobody's"
    names = {"layer_module_tmp": "model.layers.{}", "rewrite_module_tmp": "model.layers.{}.mlp.down_proj"}
    partial, batch = PartialModel(model, layout_of(model, **names)), setup("llama")[1]
    whole = model(**batch.columns(0)).logits
    result, _ = partial.run(batch.columns(0), places=batch.places())
    torch.testing.assert_close(result.logits, whole, rtol=0, atol=0)


def test_an_error_inside_leaves_no_trace() -> None:
    partial, batch = setup("gptj")
    before = partial.model(**batch.columns(0)).logits
    with pytest.raises(RuntimeError, match="size"):
        partial.run(batch.columns(0), resume=(1, torch.zeros(1)), keys=[2], outputs=[2])
    torch.testing.assert_close(partial.model(**batch.columns(0)).logits, before, rtol=0, atol=0)


def test_frozen_restores_training_flags() -> None:
    model = tiny_model("llama")
    model.train()
    model.lm_head.weight.requires_grad_(False)
    with frozen(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.layers[0].training
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
