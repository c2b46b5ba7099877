"""Adapters: several edit sets on one base, chosen for each row of a batch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import edit, facts, make
from swap_cases import IDS, LAYERS, Load, alone, edit_set, logits, model_with
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from coachhook_fast import load_edits

SETS = {"default": edit_set(0, 2), "a": edit_set(1, 5), "b": edit_set(2, 3)}
ROWS = ["b", None, "a", "default", "a", None]


def adapters() -> Any:
    model = model_with()
    model.coachhook.publish(SETS["default"])
    for name in ("a", "b"):
        model.coachhook.add_edits(name, SETS[name])
    return model


def expected(name: str | None) -> Tensor:
    return alone(None if name is None else SETS[name])


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


def test_each_row_is_served_by_its_own_edit_set() -> None:
    model = adapters()
    assert model.coachhook.adapters == ("a", "b")
    with model.coachhook.select(ROWS):
        found = logits(model, IDS.expand(len(ROWS), -1))
        with model.coachhook.disabled():
            torch.testing.assert_close(logits(model), expected(None))
    for row, name in zip(found, ROWS, strict=True):
        torch.testing.assert_close(row, expected(name)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), expected("default"))  # after the block as before it


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generation_of_a_mixed_batch_is_that_of_each_row_alone(options: dict[str, Any]) -> None:
    model, rows = adapters(), ["b", None, "a"]
    ids = IDS[:, :6]
    with model.coachhook.select(rows):
        found = generated(model, ids.expand(3, -1), **options).reshape(3, -1, ids.shape[1] + 8)
    assert not torch.equal(found[0], found[2])
    for row, name in zip(found, rows, strict=True):
        single = model_with()
        if name is not None:
            single.coachhook.publish(SETS[name])
        assert torch.equal(row, generated(single, ids, **options))


def test_edit_sets_come_and_go_under_selections_of_other_threads() -> None:
    """Threads that select rows see, row by row, one whole version; a block goes on with what it selected."""
    model = adapters()

    def run() -> Tensor:
        with model.coachhook.select(["default", None, "a"]):
            return logits(model, IDS.expand(3, -1))

    other = edit_set(7, 4)
    whole = [torch.cat([expected("default"), expected(None), version]) for version in (expected("a"), alone(other))]
    with Load(run, whole) as load:
        for swap in range(60):
            model.coachhook.add_edits("a", SETS["a"] if swap % 2 else other)
            model.coachhook.add_edits("b", SETS["b"])
            model.coachhook.remove_edits("b")
    assert not load.problems, load.problems[:2]
    with model.coachhook.select(["a"]):
        model.coachhook.remove_edits("a")
        torch.testing.assert_close(logits(model), expected("a"))
    assert model.coachhook.adapters == ()


def test_the_base_weights_and_dtypes_follow_the_model() -> None:
    model = adapters().to(torch.float64)
    with model.coachhook.select(["a"]):
        found = logits(model)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected("a"), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = adapters()
    run = torch.compile(model, backend="eager", fullgraph=True)
    for rows in (ROWS, ROWS[::-1]):
        with model.coachhook.select(rows):
            found = logits(run, IDS.expand(len(rows), -1))
        for row, name in zip(found, rows, strict=True):
            torch.testing.assert_close(row, expected(name)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(run), expected("default"))
    torch._dynamo.reset()


def test_loading_by_name_in_any_order(tmp_path: Path) -> None:
    for seed, name in enumerate(("ours", "theirs")):
        editor = make()
        edit(editor, facts(3, seed=seed))
        editor.save_pretrained(tmp_path / name)
    ids = torch.tensor([tiny_tokenizer()(facts(1, seed=seed)[0].text).input_ids[:6] for seed in (0, 1)])
    wanted = [logits(load_edits(tiny_model("llama"), tmp_path / name), ids) for name in ("ours", "theirs")]
    model = load_edits(tiny_model("llama"), tmp_path / "theirs", name="acme")
    assert torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))  # serves the rows that ask for it
    load_edits(model, tmp_path / "ours")
    load_edits(model, tmp_path / "theirs", name="again")
    for name, version in (("acme", wanted[1]), ("again", wanted[1]), ("default", wanted[0])):
        with model.coachhook.select([name]):
            torch.testing.assert_close(logits(model, ids), version, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="already has hooks"):
        load_edits(model, tmp_path / "ours")
    with pytest.raises(ValueError, match="another base model"):
        load_edits(tiny_model("llama", seed=5), tmp_path / "ours", name="acme")


def test_a_block_that_another_thread_ends_raises_and_leaves_no_selection() -> None:
    """As a streaming generator does that a pool resumes wherever there is room."""
    model = adapters()

    def stream() -> Iterator[Tensor]:
        with model.coachhook.select(["a"]):
            yield logits(model)
            yield logits(model)

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        steps = stream()
        torch.testing.assert_close(one.submit(next, steps).result(), expected("a"))
        with pytest.raises(RuntimeError, match="ended by another thread"):
            other.submit(steps.close).result()
        assert torch.equal(one.submit(logits, model).result(), expected("default"))
        with model.coachhook.select(["b"]):
            torch.testing.assert_close(logits(model), expected("b"))


def test_modes_that_run_the_model_elsewhere_are_refused() -> None:
    model = adapters()
    with model.coachhook.select(["a"]), pytest.raises(ValueError, match="leave select"):
        model.generate_batch([[5, 6, 7]])
    model.coachhook.unload()
    assert "init_continuous_batching" not in model.__dict__


def test_trace_tells_what_each_row_is_served() -> None:
    model = adapters()
    hook = model.coachhook.hooks[0]
    x = torch.randn(4, 6, hook.in_features)
    rows = ["a", None, "default", "b"]
    with model.coachhook.select(rows):
        found = hook.trace(x)
    for row, name in enumerate(rows):
        if name is None:
            assert not found.fire[row].any()
            continue
        single = model_with()
        single.coachhook.publish(SETS[name])
        alone_trace = single.coachhook.hooks[0].trace(x[row])
        torch.testing.assert_close(found.norm[row], alone_trace.norm)
        assert torch.equal(found.fire[row], alone_trace.fire)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_batches_without_rows_or_tokens(shape: tuple[int, int]) -> None:
    model = adapters()
    hook = model.coachhook.hooks[0]
    with model.coachhook.select(["a", None]):
        assert hook(torch.zeros(*shape, hook.in_features)).shape == (*shape, hook.out_features)
        assert hook.trace(torch.zeros(*shape, hook.in_features)).fire.shape == shape


def test_one_bad_token_spoils_no_other_row() -> None:
    model = adapters()
    hook = model.coachhook.hooks[0]
    x = torch.randn(4, 3, hook.in_features)
    bad = x.clone()
    bad[2, 1] = torch.nan
    with model.coachhook.select(["a", None, "a", "b"]):
        clean, found = hook(x), hook(bad)
    assert found[2, 1].isnan().all()
    found[2, 1] = clean[2, 1]
    assert torch.equal(found, clean)


def test_copies_of_a_model_keep_their_edit_sets() -> None:
    model = adapters()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with other.coachhook.select(["b"]):
            torch.testing.assert_close(logits(other), expected("b"))


def test_reserve_pads_every_edit_set() -> None:
    model = adapters()
    model.coachhook.reserve(8)
    served = model.coachhook.hooks[1].served
    assert {served.state.B.shape[0], *(state.B.shape[0] for state in served.adapters.values())} == {8}
    with model.coachhook.select(["a"]):
        torch.testing.assert_close(logits(model), expected("a"), rtol=1e-4, atol=1e-4)


class TestBadInput:
    @pytest.mark.parametrize("rows", [[], "a", ["c"], ["a", "c"], [["a"]], iter([]), None, 3])
    def test_rows(self, rows: Any) -> None:
        model = adapters()
        with (
            pytest.raises(ValueError, match=r"rows must be a list|name 'c' is not among"),
            model.coachhook.select(rows),
        ):
            pass
        assert torch.equal(logits(model), expected("default"))

    def test_another_number_of_rows(self) -> None:
        model = adapters()
        with model.coachhook.select(["a", "b"]), pytest.raises(ValueError, match=r"select\(\) names 2 rows"):
            logits(model, IDS.expand(3, -1))
        assert torch.equal(logits(model), expected("default"))

    def test_a_selection_within_another(self) -> None:
        hooks = adapters().coachhook
        with hooks.select(["a"]), pytest.raises(ValueError, match="leave select"), hooks.select(["b"]):
            pass

    @pytest.mark.parametrize("name", ["", "default", None, 3])
    def test_names(self, name: Any) -> None:
        with pytest.raises(ValueError, match="name must be a name other than 'default'"):
            adapters().coachhook.add_edits(name, SETS["a"])

    def test_removing_what_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="name 'c' is not among"):
            adapters().coachhook.remove_edits("c")

    def test_the_sequence_gate(self) -> None:
        model = model_with("sequence")
        with pytest.raises(ValueError, match="need the calibrated gate"):
            model.coachhook.add_edits("a", edit_set(1, 2, "sequence"))
        model.coachhook.publish(edit_set(1, 2, "sequence"))
        with pytest.raises(ValueError, match="need the calibrated gate"), model.coachhook.select(["default"]):
            pass

    def test_other_layers(self) -> None:
        model = adapters()
        other = SETS["a"].config.replace(layers=LAYERS[:3])
        with pytest.raises(ValueError, match="the hooks are on layers"):
            model.coachhook.add_edits("c", replace(SETS["a"], config=other))
        assert model.coachhook.adapters == ("a", "b")

    @pytest.mark.parametrize("edits", [None, "edits/", {}])
    def test_what_is_no_edit_set(self, edits: Any) -> None:
        model = adapters()
        for use in (model.coachhook.publish, lambda edits: model.coachhook.add_edits("c", edits)):
            with pytest.raises(TypeError, match="edit_set must be an EditSet"):
                use(edits)
        assert torch.equal(logits(model), expected("default"))

    def test_other_modules(self) -> None:
        other = SETS["a"].config.replace(
            layer_module_tmp="model.layers.{}", rewrite_module_tmp="model.layers.{}.self_attn.o_proj"
        )
        with pytest.raises(ValueError, match="the edit set is for"):
            adapters().coachhook.add_edits("c", replace(SETS["a"], config=other))

    def test_hooks_that_are_out(self) -> None:
        hooks = adapters().coachhook
        hooks.unload()
        with pytest.raises(ValueError, match="were unloaded"), hooks.select(["a"]):
            pass
        with pytest.raises(ValueError, match="were unloaded"):
            hooks.add_edits("c", SETS["a"])

    def test_editing_within_a_selection(self) -> None:
        editor = make()
        with editor.model.coachhook.select(["default"]), pytest.raises(ValueError, match="leave select"):
            editor.edit(facts(1), progress=False)
        assert not editor.ledger
