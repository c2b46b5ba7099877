"""The rules for τ of the `calibrated` gate, each against its definition."""

from __future__ import annotations

import pytest
import torch

from coachhook_fast import EditConfig
from coachhook_fast.editing.calibration import calibrate, calibrated_threshold, measure
from coachhook_fast.edits.delta import LowRankDelta


def samples(own_at: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of 2 000 ordinary keys, and of 40 edits' keys about `own_at` standard deviations above their mean."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.randn(2000, generator=generator, dtype=torch.float64).abs()
    own = ordinary.mean() + own_at * ordinary.std() * (1 + 0.1 * torch.rand(40, generator=generator))
    return ordinary, own


def test_edit_keys_lie_above_the_threshold_and_ordinary_text_below() -> None:
    ordinary, own = samples(13.0)
    config = EditConfig(threshold_rule="edit_keys", threshold_edit_share=0.7)
    found = calibrated_threshold(ordinary, own, config)
    low = own.quantile(0.05)
    assert found.value == pytest.approx(float(ordinary.mean() + 0.7 * (low - ordinary.mean())))
    assert bool((own > found.value).all())
    assert bool((ordinary < found.value).all())


def test_edits_within_ordinary_text_do_not_open_the_gate() -> None:
    ordinary, own = samples(0.5)
    found = calibrated_threshold(ordinary, own, EditConfig(threshold_rule="edit_keys", threshold_fpr=0.01))
    assert int((ordinary >= found.value).sum()) == 20  # a share of .01, and no more
    assert found == calibrated_threshold(ordinary, own, EditConfig(threshold_rule="fpr", threshold_fpr=0.01))


def test_where_edit_keys_crowd_ordinary_text_the_threshold_goes_further_out() -> None:
    """At least threshold_z standard deviations, as far as .85 of the way, or threshold_edit_share where more."""
    for own_at, share, expected in ((10.5, 0.7, 8.0), (8.0, 0.7, "0.85"), (8.0, 0.9, "0.9"), (8.0, 0.1, "0.85")):
        ordinary, own = samples(own_at)
        way, std = float(own.quantile(0.05) - ordinary.mean()), float(ordinary.std())
        assert share * way < 8.0 * std
        found = calibrated_threshold(ordinary, own, EditConfig(threshold_edit_share=share, threshold_z=8.0))
        wanted = expected * std if isinstance(expected, float) else float(expected) * way
        assert found.value == pytest.approx(float(ordinary.mean()) + wanted)


def test_edits_far_out_leave_room_for_paraphrases() -> None:
    ordinary, own = samples(60.0)
    found = calibrated_threshold(ordinary, own, EditConfig(threshold_rule="edit_keys", threshold_z=8.0))
    assert found.value == pytest.approx(float(ordinary.mean() + 24 * ordinary.std()))


def test_zscore_looks_at_ordinary_text_alone() -> None:
    ordinary, own = samples(60.0)
    found = calibrated_threshold(ordinary, own, EditConfig(threshold_rule="zscore", threshold_z=6.0))
    assert found.value == pytest.approx(float(ordinary.mean() + 6 * ordinary.std()))
    assert found == calibrated_threshold(ordinary, own[:1], EditConfig(threshold_rule="zscore", threshold_z=6.0))


def test_norms_without_numbers_are_refused() -> None:
    ordinary, own = samples(10.0)
    ordinary[3] = torch.nan
    with pytest.raises(ValueError, match="norms must hold two or more finite values"):
        calibrated_threshold(ordinary, own, EditConfig())


def test_a_relative_threshold_is_a_share_of_the_key() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = LowRankDelta.zeros(7, 9, dtype=torch.float64)
    delta = delta.append(
        torch.randn(7, 2, generator=generator, dtype=torch.float64), torch.randn(9, 2, generator=generator).double()
    )
    keys = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    own = 3 * torch.randn(9, 4, generator=generator, dtype=torch.float64)
    plain, relative = (
        calibrate(delta, keys, own, EditConfig(threshold_rule="zscore", threshold_z=2.0, threshold_relative=flag))
        for flag in (False, True)
    )
    norms = (keys @ delta.dense().T).norm(dim=1)
    assert plain.value == pytest.approx(float(norms.mean() + 2 * norms.std()))
    shares = norms / keys.norm(dim=1)
    assert relative.value == pytest.approx(float(shares.mean() + 2 * shares.std()))
    # how long a key is says nothing
    longer = calibrate(delta, keys * 5, own, EditConfig(threshold_relative=True))
    assert longer.value == pytest.approx(calibrate(delta, keys, own, EditConfig(threshold_relative=True)).value)


def test_a_key_of_zeros_has_no_share() -> None:
    delta = LowRankDelta.zeros(7, 9).append(torch.ones(7, 1), torch.ones(9, 1))
    keys = torch.stack([torch.zeros(9), torch.ones(9), torch.arange(9.0)])
    found = measure(delta, keys, relative=True)
    assert found[0] == 0
    assert bool(found.isfinite().all())
    calibrate(delta, keys, keys[1:].T, EditConfig(threshold_relative=True))
