"""Edits of other layers that a new edit would answer to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, edit, facts, make
from torch import Tensor

from coachhook_fast import EditRequest
from coachhook_fast.editing.interfering_keys import interfering_keys
from coachhook_fast.edits.edit_set import LayerUpdate

OTHER_LAYERS_WEIGHT = 0.2
ROUND_ROBIN = CONFIG.replace(layers=(0, 1, 2), round_robin=3, hard_negatives=0, other_layers_weight=OTHER_LAYERS_WEIGHT)


def edit_set(*learnt: Tensor, relative: bool = True) -> Any:
    """An edit set whose layer 0 has learnt these keys [d, n] of other layers' edits, a batch each."""
    editor = make(config=ROUND_ROBIN.replace(threshold_relative=relative))
    batch = edit(editor, facts(1))
    nothing = torch.zeros(3, 0)
    updates = [LayerUpdate(keys * OTHER_LAYERS_WEIGHT**0.5, nothing, torch.zeros(keys.shape[0], 0)) for keys in learnt]
    batches = tuple(replace(batch, layers=(update, *batch.layers[1:])) for update in updates)
    return replace(editor.edit_set, batches=batches)


@pytest.mark.parametrize("relative", [False, True])
def test_which_they_are(relative: bool) -> None:
    """By definition: answers |xᵀk| over the own key's, in proportion to the lengths where τ is; .2 to .9, sorted."""
    generator = torch.Generator().manual_seed(0)
    K = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    mixed = torch.linspace(0.0, 1.0, 30, dtype=torch.float64) * K[:, :1]
    learnt = mixed + 0.4 * torch.randn(20, 30, generator=generator, dtype=torch.float64)
    learnt *= torch.linspace(0.5, 3.0, 30)
    batch = K[:, 1:2] + torch.randn(20, 4, generator=generator, dtype=torch.float64)
    X = torch.linalg.solve(5 * torch.eye(20, dtype=torch.float64) + K @ K.T, K)
    edits = edit_set(learnt[:, :10], learnt[:, 10:], relative=relative)
    found = interfering_keys(edits, 0, K, X, batch * OTHER_LAYERS_WEIGHT**0.5)
    every = torch.cat([learnt, batch], dim=1)
    scale = (lambda keys: keys.norm(dim=0)) if relative else (lambda keys: torch.ones(keys.shape[1]))
    own = (X * K).sum(0) / scale(K)
    shares = ((X.T @ every).abs() / scale(every) / own[:, None]).amax(0)
    expected = [int(i) for i in shares.argsort(descending=True) if 0.2 < shares[i] < 0.9]
    assert 3 < len(expected) < 30
    torch.testing.assert_close(found, every[:, expected])


def test_no_others_no_interfering_keys() -> None:
    editor = make(config=CONFIG)  # all layers at once: every key is every layer's own
    edit(editor, facts(2))
    K = editor.edit_set.edit_keys(0)
    assert interfering_keys(editor.edit_set, 0, K, K, K[:, :0]).shape == (K.shape[0], 0)


def test_at_most_64() -> None:
    generator = torch.Generator().manual_seed(1)
    K = torch.randn(9, 1, generator=generator, dtype=torch.float64)
    crowd = 0.5 * K + 0.4 * torch.randn(9, 200, generator=generator, dtype=torch.float64)
    assert interfering_keys(edit_set(crowd), 0, K, K, K[:, :0]).shape == (9, 64)


def test_the_solve_passes_them_by() -> None:
    """A request whose key another layer's edit nearly has: shown to the solve, and not remembered."""
    editor = make(config=ROUND_ROBIN)
    edit(editor, facts(3))
    seen: dict[str, Any] = {}
    before = [memory.matrix() for memory in editor.memories]
    batch = edit(editor, facts(3, seed=1), observer=lambda event, layer, **found: seen.update({event: found}))
    position = next(p for p, update in enumerate(batch.layers) if update.residuals.shape[1])
    K, N, X = seen["update"]["K"], seen["update"]["N"], seen["update"]["X"]
    torch.testing.assert_close(X, torch.linalg.solve(before[position] + K @ K.T + N @ N.T, K))
    torch.testing.assert_close(editor.memories[position].matrix(), before[position] + K @ K.T, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_subject_edited_anew_does_not_interfere_with_itself() -> None:
    """The later fact wins, in whichever layer the earlier one is."""
    request = facts(1)[0]
    for again in range(1, 4):  # the second batch's turn is another layer's, a third's the last one's
        editor = make(config=ROUND_ROBIN.replace(mom2_update_weight=0.05))
        edit(editor, [request])
        for seed in range(1, again):
            edit(editor, facts(1, seed=seed))
        batch = edit(editor, [EditRequest(prompt=request.prompt, subject=request.subject, target_new="Cork")])
        assert batch.outcomes[0].residual_left < 0.5, again
