"""Settings of the gate and of its thresholds."""

from __future__ import annotations

from dataclasses import dataclass

from coachhook_fast.config.checks import check_flag, check_number

GATES = ("calibrated", "sequence")
THRESHOLD_RULES = ("edit_keys", "zscore", "fpr")


@dataclass(frozen=True)
class GateSettings:
    """Which tokens take the edited output (docs/method.md section 3).

    Args:
        gate: "calibrated" or "sequence".
        alpha: the `sequence` gate's first threshold α; it never rises.
        threshold_rule: "edit_keys", "zscore" or "fpr", how `calibrated` finds τ (see editing/calibration.py and
            docs/experiments/gates.md).
        threshold_relative: τ is compared with ||Δk|| / ||k|| and not with ||Δk||: tokens that an earlier layer has
            edited have long keys and would answer to later layers too (docs/experiments/relative-threshold.md).
            `calibrated` only. None: where `round_robin` is above 1; the paper's is False.
        threshold_whitened: ||Δk|| is measured against how ordinary text spreads along each of Δ's directions
            (edits/whitening.py, docs/experiments/whitening.md). `calibrated` only. None: where `round_robin` is above
            1; the paper's is False.
        threshold_edit_share: for "edit_keys", where τ lies between ordinary text (0) and the edit keys (1).
        threshold_z: standard deviations above the mean for "zscore"; "edit_keys" takes at least as many, as far as that
            is not over .85 of the way, and at most three times as many.
        threshold_fpr: share of ordinary tokens that may pass for "fpr", and at most for "edit_keys".
        threshold_keys: ordinary keys kept a layer to find τ.
    """

    gate: str = "calibrated"
    alpha: float = 2.2
    threshold_rule: str = "edit_keys"
    threshold_relative: bool | None = None
    threshold_whitened: bool | None = None
    threshold_edit_share: float = 0.75
    threshold_z: float = 8.0
    threshold_fpr: float = 3e-3
    threshold_keys: int = 4096

    def _check_gate(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {self.gate!r}")
        if self.threshold_rule not in THRESHOLD_RULES:
            raise ValueError(f"threshold_rule must be one of {THRESHOLD_RULES}, got {self.threshold_rule!r}")
        for name in ("threshold_relative", "threshold_whitened"):
            check_flag(name, getattr(self, name))
            if getattr(self, name) and self.gate != "calibrated":
                raise ValueError(f"{name} must be false where the gate is {self.gate!r}, got true")
        for name in ("alpha", "threshold_edit_share", "threshold_z", "threshold_fpr"):
            check_number(name, getattr(self, name), above=0.0)
        if self.threshold_edit_share > 1:
            raise ValueError(f"threshold_edit_share must be a share of at most 1, got {self.threshold_edit_share}")
        if self.threshold_fpr >= 1:
            raise ValueError(f"threshold_fpr must be a share under 1, got {self.threshold_fpr}")
        check_number("threshold_keys", self.threshold_keys, least=2, integer=True)

    def calibrates_otherwise(self, other: GateSettings) -> bool:
        """Whether τ of the `calibrated` gate is found by another rule than with `other`."""
        rule = ("threshold_rule", "threshold_edit_share", "threshold_z", "threshold_fpr")
        return self.gate == "calibrated" and any(getattr(self, name) != getattr(other, name) for name in rule)
