"""The oracle itself, checked by hand: numbers of docs/method.md and small cases with a known answer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plain_coachhook import (
    BASE,
    TEMPORARY,
    VALIDATED,
    PlainCoachHook,
    Settings,
    insertion,
    project,
    published_hook,
    z_scores,
)
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer


def spikes(n: int, *, high: int = 1) -> torch.Tensor:
    """Norms of n tokens of which `high` are edited subjects and the others are still."""
    return torch.cat([torch.ones(high), torch.zeros(n - high)]).double()


def plain(family: str = "gpt2", **settings: Any) -> PlainCoachHook:
    tokenizer = tiny_tokenizer()
    corpus = [tokenizer(text).input_ids for text in tiny_texts(8)]
    defaults: dict[str, Any] = {"layers": [1, 2], "update_weight": 10.0, "steps": 3, "v_lr": 0.2}
    return PlainCoachHook(
        tiny_model(family, dtype=torch.float64), tokenizer, Settings(**{**defaults, **settings}), corpus
    )


# ------------------------------------------------------------------ the gate


@pytest.mark.parametrize("n", range(2, 20))
def test_largest_possible_z(n: int) -> None:
    bound = (n - 1) / math.sqrt(n)
    assert z_scores(spikes(n))[0].item() == pytest.approx(bound, rel=1e-12)
    torch.manual_seed(n)
    assert all(z_scores(torch.rand(n).double() ** 4).max() <= bound + 1e-12 for _ in range(100))


def test_trap_numbers_one_to_three() -> None:
    assert z_scores(spikes(1)).isnan().all()  # 1: one token has no z ...
    assert not (z_scores(spikes(1)) >= -math.inf).any()  # ... and fires at no threshold
    assert z_scores(spikes(8))[0].item() == pytest.approx(2.47, abs=0.005)  # 2: eight tokens ...
    assert z_scores(spikes(16))[0].item() == pytest.approx(3.75, abs=0.005)  # ... and eight still pads
    lively = torch.cat([spikes(8), torch.full((8,), 0.6243).double()])  # ... and eight pads that move
    assert z_scores(lively)[0].item() == pytest.approx(1.77, abs=0.005)
    assert z_scores(spikes(6))[0].item() == pytest.approx(2.04, abs=0.005)  # 3: short prompts
    assert z_scores(spikes(7))[0].item() == pytest.approx(2.27, abs=0.005)
    assert z_scores(spikes(10, high=2))[:2].tolist() == pytest.approx([1.90, 1.90], abs=0.005)


def test_published_hook_by_hand() -> None:
    base = torch.arange(12.0).double().reshape(4, 3)
    change = torch.tensor([[0.0, 0, 0], [3, 0, 4], [0, 1, 0], [0, 0, 0]]).double()  # norms 0, 5, 1, 0
    outputs, norms, z, fire = published_hook(base, base + change, alpha=1.0)
    std = math.sqrt((2 * 1.5**2 + 3.5**2 + 0.5**2) / 3)
    assert norms.tolist() == [0, 5, 1, 0]
    assert z.tolist() == pytest.approx([-1.5 / std, 3.5 / std, -0.5 / std, -1.5 / std])
    assert fire.tolist() == [False, True, False, False]
    assert outputs.tolist() == [[0, 1, 2], [6, 4, 9], [6, 7, 8], [9, 10, 11]]
    assert published_hook(base, base + change, alpha=3.5 / std)[3].sum() == 1  # at the threshold: fires


def test_nothing_fires_before_the_first_edit() -> None:
    for gate in ("sequence", "calibrated"):
        oracle = plain(gate=gate, alpha=1e-9)
        ids = oracle.tokenizer("Ada Vale works as a").input_ids
        seen = oracle.run(ids, VALIDATED)
        assert not any(fire.any() for fire in seen.fire)
        expected = oracle.model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(seen.logits, expected, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------ target values


def test_projection() -> None:
    delta = torch.tensor([3.0, 4.0]).double()
    assert project(delta, 2.5).tolist() == [1.5, 2.0]
    assert project(delta, 5.0).tolist() == [3.0, 4.0]


def test_first_adam_step_moves_every_coordinate_by_the_learning_rate() -> None:
    oracle = plain(steps=1, v_lr=1e-3, weight_decay=0.0)
    fact = tiny_facts(1)[0]
    v, loss, taken = oracle.target_value(fact)
    prompt, _, lookup = oracle.rows(fact)[-1]
    v0 = oracle.run(prompt, BASE).block[lookup]
    assert (v - v0).abs().tolist() == pytest.approx([1e-3] * len(v0), rel=1e-3)
    assert taken == 1
    assert loss > 0.05


@pytest.mark.slow
def test_target_value_stays_in_the_ball_and_lowers_the_loss() -> None:
    oracle = plain("llama", steps=25, v_lr=0.5)
    fact = tiny_facts(1)[0]
    prompt, _, lookup = oracle.rows(fact)[-1]
    v0 = oracle.run(prompt, BASE).block[lookup]
    v, loss, taken = oracle.target_value(fact)
    oracle.settings.steps = 1
    assert loss < oracle.target_value(fact)[1] - 0.05  # one step: its loss is that of δ = 0
    assert (v - v0).norm() <= 0.75 * v0.norm() * (1 + 1e-12)
    oracle.settings.loss_threshold = math.inf  # a request that is good enough at once is left alone
    v, _, taken = oracle.target_value(fact)
    assert torch.equal(v, v0)
    assert taken == 0


def test_delta_moves_nothing_before_its_token() -> None:
    oracle = plain("llama")
    ids = oracle.tokenizer("Ada Vale works as a").input_ids
    at = 5
    before = oracle.run(ids, BASE).logits
    after = oracle.run(ids, BASE, delta=torch.ones(24).double(), at=at).logits
    assert torch.equal(before[:at], after[:at])
    assert (before[at:] - after[at:]).abs().amax(dim=-1).min() > 1e-6


# ------------------------------------------------------------------ keys and the insertion


@pytest.mark.parametrize("seed", range(3))
def test_share_of_a_residual_that_goes_in(seed: int) -> None:
    """One key: Δk = s/(1+s) R with s = kᵀC⁻¹k (docs/method.md section 6)."""
    torch.manual_seed(seed)
    d, m = 7, 5
    factor = torch.randn(d, d).double()
    C, k, R = factor @ factor.T + torch.eye(d), torch.randn(d, 1).double(), torch.randn(m, 1).double()
    X, s = insertion(C, k)
    share = s / (1 + s)
    torch.testing.assert_close(R @ X.T @ k, R * share, rtol=1e-11, atol=0)


def test_insertion_by_hand() -> None:
    """C = diag(1, 3), k = (2, 0): C + kkᵀ = diag(5, 3), so X = (2/5, 0) and s = 4."""
    X, s = insertion(torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([[2.0], [0.0]]))
    assert X.flatten().tolist() == pytest.approx([0.4, 0.0])
    assert s.item() == pytest.approx(4.0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_temporary_hook_is_the_model_with_changed_weights(family: str) -> None:
    oracle = plain(family)
    torch.manual_seed(0)
    oracle.Wh = [weight + 0.1 * torch.randn_like(weight) for weight in oracle.Wh]
    ids = oracle.tokenizer(tiny_texts(1)[0]).input_ids
    changed = copy.deepcopy(oracle)
    for place, weight in zip(changed.places, oracle.Wh, strict=True):
        place.weight.data = weight.T if family == "gpt2" else weight
    expected = changed.model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(oracle.run(ids, TEMPORARY).logits, expected, rtol=1e-10, atol=1e-10)
    untouched = oracle.model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(oracle.run(ids, BASE).logits, untouched, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bos", [False, True])
def test_lookup_is_the_last_token_of_the_subject(bos: bool) -> None:
    oracle = plain()
    oracle.tokenizer = tiny_tokenizer(bos=bos)
    for fact in tiny_facts(12):
        text = fact["prompt"].format(fact["subject"])
        end = text.index(fact["subject"]) + len(fact["subject"])
        spans = oracle.tokenizer(text, return_offsets_mapping=True).offset_mapping
        first, last = spans[oracle.rows(fact)[-1][2]]
        assert first < end <= last


def test_one_batch_by_its_definition() -> None:
    """One layer, one fact: K is half bare, half mean of contexts, R is the whole residual, and under the
    temporary hook the edited block's output moves by R·(Xᵀk) at the lookup position."""
    oracle = plain(layers=[2])
    fact = tiny_facts(1)[0]
    rows = oracle.rows(fact)
    clean = [oracle.run(prompt, BASE) for prompt, _, _ in rows]
    keys = torch.stack([seen.keys[0][lookup] for seen, (_, _, lookup) in zip(clean, rows, strict=True)])
    C = oracle.C[0]
    batch = oracle.edit([fact])
    torch.testing.assert_close(batch.K[0][:, 0], 0.5 * keys[5] + 0.1 * keys[:5].sum(0), rtol=1e-12, atol=0)
    bare, lookup = clean[5], rows[5][2]
    torch.testing.assert_close(batch.R[0], batch.V - bare.block[lookup][:, None], rtol=1e-12, atol=0)
    torch.testing.assert_close((C + batch.K[0] @ batch.K[0].T) @ batch.X[0], batch.K[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(batch.delta[0], batch.R[0] @ batch.X[0].T, rtol=1e-9, atol=1e-12)
    moved = oracle.run(rows[5][0], TEMPORARY).block[lookup] - bare.block[lookup]
    torch.testing.assert_close(moved, batch.delta[0] @ keys[5], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_alpha_never_rises_and_every_edit_reaches_it() -> None:
    oracle = plain(gate="sequence", alpha=2.2, steps=6)
    facts = tiny_facts(6)
    alphas = [[2.2, 2.2]]
    for start in (0, 2, 4):
        batch = facts[start : start + 2]
        alphas.append(oracle.edit(batch).thresholds)
        assert all(new <= old for new, old in zip(alphas[-1], alphas[-2], strict=True))
        for fact in batch:
            prompt, target, _ = oracle.rows(fact)[-1]
            assert all(fire.any() for fire in oracle.run(prompt, VALIDATED).fire)
            assert all(fire.any() for fire in oracle.run(prompt + target, VALIDATED).fire)


def test_calibrated_threshold_by_hand() -> None:
    oracle = plain(gate="calibrated", threshold_z=3.0)
    W0 = oracle.W0[0]
    change = torch.zeros_like(W0)
    change[4, 7] = 2.0  # ‖Δk‖ = 2|k_7|
    oracle.Wh[0] = W0 + change
    norms = [2 * abs(key[7].item()) for key in oracle.corpus_keys[0]]
    mean = sum(norms) / len(norms)
    std = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / (len(norms) - 1))
    assert oracle.calibrated_threshold(0) == pytest.approx(mean + 3 * std)
    oracle.settings.rule, oracle.settings.threshold_fpr = "fpr", 0.1
    tau = oracle.calibrated_threshold(0)
    assert sum(norm >= tau * (1 - 1e-12) for norm in norms) == round(0.1 * len(norms))
