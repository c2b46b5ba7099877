"""What a layer's gate compares with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """A layer's threshold: τ (`calibrated`, of ||Δk|| or of ||Δk|| / ||k||) or α (`sequence`, in standard deviations).

    `mean` and `std` describe what τ is compared with over ordinary text and serve to show a token's z.
    """

    value: float
    mean: float = float("nan")
    std: float = float("nan")
