"""A model with hooks as a whole: packed sequences, threads, copies, and unloading."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from generate_cases import (
    GATES,
    TEXTS,
    generate,
    hooked,
    ids_of,
    reference,
)
from tiny import CACHE, tiny_model
from transformers import DynamicCache


@pytest.mark.parametrize("told_by", ["positions", "boundaries"])
def test_packed_sequences(told_by: str) -> None:
    """Documents behind one another in a row, each judged by its own tokens."""
    model = hooked("sequence", dtype=torch.float64)
    documents = [ids_of(text) for text in TEXTS]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents])[None]
    options: dict[str, Any] = {"position_ids": positions}
    if told_by == "boundaries":
        lengths = torch.tensor([0, *[ids.shape[1] for ids in documents]])
        options["cu_seq_lens_q"] = lengths.cumsum(0)
    traces: list[Any] = []
    hook = model.coachhook.hooks[0]
    hook.register_forward_pre_hook(lambda module, args: traces.append(module.trace(args[0])))
    with torch.no_grad():
        model(torch.cat(documents, dim=1), use_cache=False, **options)
        for ids in documents:
            model(ids, use_cache=False)
    packed = traces[0].z[0].split([ids.shape[1] for ids in documents])
    for found, alone in zip(packed, traces[1:], strict=True):
        torch.testing.assert_close(found, alone.z[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "of 4 dimensions"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])}, "larger values"),
    ],
)
def test_sequence_refuses_what_hides_the_boundaries(options: dict[str, Any], message: str) -> None:
    model = hooked("sequence")
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[5, 6, 7, 8, 9, 10]]), **options)


def test_sequence_refuses_packed_tokens_behind_a_cache() -> None:
    model = hooked("sequence")
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6, 7]]), **{CACHE: cache})
    with pytest.raises(ValueError, match="packed sequences in a cache"):
        model(torch.tensor([[8, 9, 8, 9]]), **{CACHE: cache}, position_ids=torch.tensor([[3, 4, 0, 1]]))


# ------------------------------------------------------------------ threads, copies, unloading


@pytest.mark.parametrize("gate", GATES)
def test_threads_do_not_mix_their_sequences(gate: str) -> None:
    model = hooked(gate)
    expected = [reference(model, ids_of(text)) for text in TEXTS]
    wrong: list[Any] = []

    def work(texts: Sequence[str], rows: Sequence[list[int]]) -> None:
        for text, row in zip(texts, rows, strict=True):
            made = generate(model, ids_of(text))
            if made != row:
                wrong.append((text, made, row))

    workers = [
        threading.Thread(target=work, args=(TEXTS[shift:] + TEXTS[:shift], expected[shift:] + expected[:shift]))
        for shift in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("gate", GATES)
def test_a_deep_copy_is_a_model_of_its_own(gate: str) -> None:
    model = hooked(gate)
    copied = copy.deepcopy(model)
    ids = ids_of(TEXTS[0])
    expected = generate(model, ids)
    copied.coachhook.disable()
    with model.coachhook.disabled():
        base = generate(model, ids)
    assert generate(copied, ids) == base != expected
    assert generate(model, ids) == expected


@pytest.mark.parametrize("gate", GATES)
def test_unload_leaves_nothing_behind(gate: str) -> None:
    untouched = tiny_model("llama")
    model = hooked(gate)
    model.coachhook.unload()
    assert set(model.__dict__) == set(untouched.__dict__)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert "generate" not in model.__dict__
    ids = ids_of(TEXTS[0])
    assert torch.equal(model(ids).logits, untouched(ids).logits)
