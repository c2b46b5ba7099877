"""The metric of the gate: what it is by definition, that it changes no Δ, and that it travels with the edit set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editor_cases import CONFIG, assert_same, edit, facts, logits, make, snapshot
from tiny import tiny_tokenizer
from torch import Tensor

from coachhook_fast import Editor, load_edits
from coachhook_fast.editing.calibration import measure
from coachhook_fast.edits import store
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.whitening import whitened

M, D = 13, 31
ROUND_ROBIN = CONFIG.replace(layers=(0, 1, 2), round_robin=3)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(n: int, dtype: torch.dtype = torch.float64) -> tuple[LowRankDelta, Tensor, Tensor, Tensor]:
    """(delta of n edits, R, X, E): E far from round, R with a direction that all share."""
    R = random(M, n, seed=1) + 3 * random(M, 1, seed=2)
    X = random(D, n, seed=3)
    half = random(D, D, seed=4) * torch.logspace(0, -2, D, dtype=torch.float64)
    E = half @ half.T
    delta = LowRankDelta.zeros(M, D, dtype=dtype).append(R.to(dtype), X.to(dtype))
    return delta, R.to(dtype), X.to(dtype), E.to(dtype)


def defined(dense: Tensor, E: Tensor, rank: int, keys: Tensor) -> Tensor:
    """√(yᵀ (S / mean + 1)⁺ y) on the span of Δ, y = Δk, S = Δ E Δᵀ, mean = tr S / rank."""
    S = dense @ E @ dense.T
    span = torch.linalg.svd(dense)[0][:, :rank]
    inverse = span @ torch.linalg.inv(span.T @ S @ span * rank / S.trace() + torch.eye(rank).to(S)) @ span.T
    y = keys @ dense.T
    return ((y @ inverse) * y).sum(dim=1).sqrt()


@pytest.mark.parametrize("n", [1, 5, 12, 40])  # 12 and 40 of 13 x 31: dense
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_its_definition(n: int, dtype: torch.dtype) -> None:
    plain, R, X, E = case(n, dtype)
    delta = whitened(plain, R, E @ X)
    assert delta.is_dense == (n >= 12)
    keys = random(20, D, seed=5)
    expected = defined(plain.dense().double(), E.double(), delta.rank, keys)
    tight = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(delta.norms(keys.to(dtype)).double(), expected, rtol=tight, atol=tight)
    assert not torch.allclose(expected, plain.norms(keys.to(dtype)).double(), rtol=0.1)
    served = delta.served()
    torch.testing.assert_close(served.dense(), plain.dense(), rtol=tight, atol=10 * tight)
    torch.testing.assert_close(served.norms(keys), delta.norms(keys), rtol=tight, atol=tight)
    assert served.W is None
    assert served.served() is served


def test_it_tells_apart_what_the_l2_norm_does_not() -> None:
    """Ordinary keys all answer along one direction; an edit's key answers as strongly along its own."""
    d = 20
    U = torch.linalg.qr(random(M, 2, seed=1))[0]
    X = torch.zeros(d, 2, dtype=torch.float64)
    X[0, 0] = X[1, 1] = 1.0
    E = torch.eye(d, dtype=torch.float64) * 1e-3
    E[0, 0] = 1.0  # ordinary text has much of the first coordinate
    plain = LowRankDelta.zeros(M, d, dtype=torch.float64).append(U, X)
    delta = whitened(plain, U, E @ X)
    ordinary, own = torch.eye(d, dtype=torch.float64)[:2]
    assert plain.norms(own) == pytest.approx(float(plain.norms(ordinary)))
    assert float(delta.norms(own)) > 1.5 * float(delta.norms(ordinary))


def test_half_precision_keeps_each_direction() -> None:
    """Rows are scaled one by one, so bf16 factors are as near to Δ as without a metric, however unlike the scales."""
    plain, R, X, E = case(6, torch.float32)
    exact = plain.dense()

    def error(delta: LowRankDelta) -> float:
        rounded = delta.to(dtype=torch.bfloat16)
        assert rounded.U is not None
        return float((rounded.U.float() @ rounded.B.float() - exact).norm() / exact.norm())

    assert error(whitened(plain, R, E @ X).served()) < 2 * error(plain)


def test_operations_give_deltas_without_it() -> None:
    plain, R, X, E = case(5)
    delta = whitened(plain, R, E @ X)
    assert delta.W is not None
    zero = torch.zeros(M, 1, dtype=torch.float64), torch.zeros(D, 1, dtype=torch.float64)
    for other in (delta.append(R, X), delta.append(*zero), delta.remove(R, X), delta.truncate(rank=9)[0]):
        assert other.W is None
    assert delta.to(dtype=torch.float32).W is not None
    again = LowRankDelta.from_state_dict(delta.state_dict())
    assert torch.equal(again.W, delta.W)  # type: ignore[arg-type]
    assert delta.W is not None
    for W in (delta.W * 0, delta.W * torch.nan, delta.W + 1):
        with pytest.raises(ValueError, match="orthogonal rows"):
            LowRankDelta.from_state_dict({**delta.state_dict(), "W": W})
    for W in (torch.eye(4).double(), torch.eye(5)):
        with pytest.raises(ValueError, match="W must be"):
            plain.with_metric(W)


def test_nothing_edited_nothing_measured() -> None:
    empty = LowRankDelta.zeros(M, D)
    assert whitened(empty, torch.zeros(M, 0), torch.zeros(D, 0)) is empty
    assert whitened(empty, torch.zeros(M, 2), torch.zeros(D, 2)) is empty


# ------------------------------------------------------------------ in an edit set


def test_the_editor_measures_by_its_statistics() -> None:
    editor = make(config=ROUND_ROBIN)
    for seed in range(4):
        edit(editor, facts(2, seed=seed))
    assert editor.statistics is not None
    edits = editor.edit_set
    for position, layer in enumerate(edits.layers):
        delta, keys = edits.deltas[position], editor.statistics.samples[layer]
        E = editor.statistics.moments[layer].double()
        expected = defined(delta.dense().double(), E, delta.rank, keys.double())
        torch.testing.assert_close(delta.norms(keys).double(), expected, rtol=1e-3, atol=1e-5)
        ordinary = measure(delta, keys, relative=True)
        assert edits.thresholds[position].mean == pytest.approx(float(ordinary.mean()), rel=1e-5)
        served = editor.hooks[position]
        torch.testing.assert_close(served.get_delta_weight(), delta.dense(), rtol=1e-4, atol=1e-6)
        norm = served.trace(keys[None]).norm[0]
        torch.testing.assert_close(norm, ordinary.to(norm), rtol=1e-4, atol=1e-6)


def test_it_is_saved_and_rolled_back_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(config=ROUND_ROBIN)
    states = []
    for number in range(5):
        batch = edit(editor, facts(10)[2 * number : 2 * number + 2])
        states.append((snapshot(editor), logits(editor.model), editor.edit_set))
    editor.save_pretrained(tmp_path)
    saved = store.load(tmp_path)
    for mine, theirs in zip(saved.deltas, editor.edit_set.deltas, strict=True):
        assert torch.equal(mine.W, theirs.W)  # type: ignore[arg-type]
    for (delta, _), theirs in zip(store.load_weights(tmp_path), editor.edit_set.deltas, strict=True):
        assert torch.equal(delta.B, theirs.served().B)
    model = editor.unload()
    load_edits(model, tmp_path)
    assert torch.equal(logits(model), states[-1][1])
    model.coachhook.unload()  # type: ignore[operator, union-attr]
    again = Editor(model, tiny_tokenizer(), edits=tmp_path)
    monkeypatch.setattr(again, "collect_statistics", lambda *_, **__: pytest.fail("the last batch needs no statistics"))
    again.rollback(batch.id)
    before = states[-2][2]
    for mine, theirs in zip(again.edit_set.deltas, before.deltas, strict=True):
        assert torch.equal(mine.B, theirs.B)
        assert torch.equal(mine.W, theirs.W)  # type: ignore[arg-type]
    assert again.edit_set.thresholds == before.thresholds
    assert torch.equal(logits(model), states[-2][1])


def test_a_batch_in_the_middle_is_rolled_back() -> None:
    editor = make(config=ROUND_ROBIN)
    batches = [edit(editor, facts(2, seed=seed)) for seed in range(4)]
    editor.rollback(batches[0].id)
    position = next(p for p, update in enumerate(batches[0].layers) if update.residuals.shape[1])
    rest = [batch.layers[position] for batch in editor.edit_set.batches]
    R, Z = (torch.cat([getattr(update, name) for update in rest], dim=1) for name in ("residuals", "spread"))
    delta = editor.edit_set.deltas[position]
    assert torch.equal(whitened(delta, R, Z).W, delta.W)  # type: ignore[arg-type]
    assert editor.statistics is not None
    keys = editor.statistics.samples[editor.layers[position]]
    expected = float(measure(delta, keys, relative=True).double().mean())
    assert editor.edit_set.thresholds[position].mean == pytest.approx(expected, rel=1e-6)


def test_without_it_nothing_is_kept() -> None:
    editor = make(config=ROUND_ROBIN.replace(threshold_whitened=False))
    edit(editor, facts(2))
    assert all(update.spread is None for update in editor.edit_set.batches[0].layers)
    assert all(delta.W is None for delta in editor.edit_set.deltas)
    whole = make(config=CONFIG)
    edit(whole, facts(2))
    assert not whole.config.threshold_whitened
    assert all(delta.W is None for delta in whole.edit_set.deltas)


def test_batches_without_a_spread_are_refused() -> None:
    editor = make(config=ROUND_ROBIN)
    batches = [edit(editor, facts(2, seed=seed)) for seed in range(2)]
    stripped = [replace(b, layers=tuple(replace(u, spread=None) for u in b.layers)) for b in batches]
    before = snapshot(editor)
    editor.edit_set = replace(editor.edit_set, batches=tuple(stripped))
    with pytest.raises(ValueError, match="threshold_whitened is true"):
        editor.rollback(batches[0].id)
    editor.edit_set = replace(editor.edit_set, batches=tuple(batches))
    assert_same(snapshot(editor), before)
