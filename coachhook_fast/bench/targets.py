"""`coachhook bench targets`: target values, and whole batches, against one request at a time.

The baseline is slow, so it works on the first `sample` requests of the batch; seconds are per edit on both sides.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from coachhook_fast.bench import gpu_targets
from coachhook_fast.bench.rows import Row, baseline, once, row
from coachhook_fast.bench.workload import corpus, gemm_rate, needed_flops, requests
from coachhook_fast.config import EditConfig
from coachhook_fast.editing.editor import Editor
from coachhook_fast.editing.keys import bare_outputs
from coachhook_fast.editing.targets.optimise import Target, optimise
from coachhook_fast.models.loading import load_model
from coachhook_fast.models.passes.forward import frozen
from coachhook_fast.request import TokenisedRequest, tokenise_batch

# What small models need otherwise than the paper's.
_OF_THE_MODEL: dict[str, Any] = {"gate": "calibrated", "mom2_update_weight": None}


def run(model: str | None = None, count: int = 20, sample: int = 4) -> list[Row]:
    """Rows "target values" and "whole batch" of `count` edits; the baseline does `sample` of them. Where there is a
    GPU and no model is named, rows of random models on it instead (gpu_targets.py), which need no files."""
    if model is None and torch.cuda.is_available():
        return gpu_targets.run()
    model = model or "smollm2"
    loaded, tokenizer = load_model(model, dtype=torch.float32)
    editor = Editor(
        loaded, tokenizer, EditConfig.paper(**_OF_THE_MODEL)
    )  # six rows a request and 25 steps, as published
    editor.collect_statistics(corpus(), progress=False)
    wanted, source = requests(count)
    batch = tokenise_batch(wanted, tokenizer, editor.edit_set.contexts, None)
    shape = f"{model}, {count} requests of {source}, {len(batch[0].rows)} contexts, layers {editor.layers}"
    return [_values(editor, batch, sample, shape), _batches(editor, batch, sample, shape)]


def _values(editor: Editor, batch: list[TokenisedRequest], sample: int, shape: str) -> Row:
    partial, config, last = editor.partial, editor.config, editor.layers[-1]
    plain, before = baseline("one_at_a_time"), gemm_rate(device=partial.device)
    with frozen(editor.model):
        v0 = bare_outputs(partial, last, batch, pad_id=0, max_tokens=config.pass_tokens)
        found: list[Target] = []
        ours = once(lambda: found.extend(optimise(partial, last, batch, v0, config, pad_id=0, whole_rows=False)))
        expected: list[Any] = []
        block = partial.blocks[last]
        theirs = once(
            lambda: expected.extend(plain.target_value(editor.model, block, t, config, 0) for t in batch[:sample])
        )
    differences = [float((f.value - v).norm() / v.norm()) for f, (v, _) in zip(found, expected, strict=False)]
    same_steps = [f.steps == steps for f, (_, steps) in zip(found, expected, strict=False)]
    per_edit = ours / len(batch)
    return row(
        "target values, an edit",
        "one request at a time, whole model, whole sequence",
        [per_edit],
        [theirs / sample],
        floor_seconds=_floor(editor, batch, found, before) / len(batch),
        checked=max(differences) < 1e-4 and all(same_steps),
        dtype=torch.float32,
        shape=shape,
        largest_difference=max(differences),
        steps=sum(f.steps for f in found) / len(found),
        baseline_requests=sample,
    )


def _floor(editor: Editor, batch: list[TokenisedRequest], found: list[Target], before: float) -> float:
    """Seconds of what no step can avoid, at the better of two product rates, one taken `before` the work (flops/s) and
    one now, since a noisy machine may slow down in either moment."""
    partial = editor.partial
    return needed_flops(partial, editor.layers[-1], batch, found) / max(before, gemm_rate(device=partial.device))


def _batches(editor: Editor, batch: list[TokenisedRequest], sample: int, shape: str) -> Row:
    partial, layers = editor.partial, editor.layers
    plain, before = baseline("one_at_a_time"), gemm_rate(device=partial.device)
    downs = [hook.base for hook in editor.hooks]
    matrices = [memory.matrix() for memory in editor.memories]
    expected: list[torch.Tensor] = []
    few = batch[:sample]
    with editor.disabled(), frozen(editor.model):
        theirs = once(
            lambda: expected.extend(
                plain.edit(editor.model, partial.blocks, downs, layers, matrices, few, editor.config, 0)
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The method gates layers already updated, the baseline does not: compared with the gate open.
        checker = editor.edit([tokens.request for tokens in few], progress=False)
        first = checker.layers[0]
        difference = float((first.residuals @ first.directions.T - expected[0]).norm() / expected[0].norm())
        editor.rollback(checker.id)
        ours = once(lambda: editor.edit([tokens.request for tokens in batch], progress=False))
    found = [Target(torch.empty(0), outcome.loss, outcome.steps) for outcome in editor.ledger[-1].outcomes]
    return row(
        "whole batch, an edit",
        "published flow: one request at a time, whole passes, LU solve",
        [ours / len(batch)],
        [theirs / sample],
        floor_seconds=_floor(editor, batch, found, before) / len(batch),
        checked=difference < 1e-3,
        dtype=torch.float32,
        shape=shape,
        largest_difference=difference,
        baseline_requests=sample,
    )
