"""AlphaEdit (Fang et al. 2024): updates only in the null space of what ordinary text's keys span.

    P = U Uᵀ, U the eigenvectors of E[kkᵀ] with eigenvalues below a threshold
    Δ_i += R Kᵀ P (Σ_t K_t K_tᵀ P + K Kᵀ P + l2 I)⁻¹

The published threshold, 2e-2, is in units of E[kkᵀ] of models whose keys are larger than a small model's; it is given
here as a share of the eigenvalues' sum that the null space may hold (`NULL_SHARE`), so that it means the same for
every model. `L2` is the published 10 scaled by the same rule as λ, d / 16 384.
"""

from __future__ import annotations

import torch
from baselines.common import LayerByLayer
from torch import Tensor

NULL_SHARE = 0.02
L2 = 10.0
_PAPER_WIDTH = 16_384


class AlphaEdit(LayerByLayer):
    name = "alphaedit"

    def prepare(self) -> None:
        self.projections, self.seen = [], []
        for layer in self.layers:
            values, vectors = torch.linalg.eigh(self.statistics.moments[layer].double())  # ascending
            kept = values.cumsum(0) <= NULL_SHARE * values.sum()
            self.projections.append(vectors[:, kept] @ vectors[:, kept].T)
            self.seen.append(torch.zeros_like(self.projections[-1]))

    def directions(self, position: int, keys: Tensor) -> Tensor:
        projection, seen = self.projections[position], self.seen[position]
        identity = torch.eye(projection.shape[0], dtype=torch.float64)
        l2 = L2 * projection.shape[0] / _PAPER_WIDTH
        # Δᵀ = (P (Σ KKᵀ + KKᵀ) + l2 I)⁻¹ P K Rᵀ
        solved = torch.linalg.solve(projection @ (seen + keys @ keys.T) + l2 * identity, projection @ keys)
        seen += keys @ keys.T
        return solved

    def memory(self) -> dict[str, Tensor]:
        return {f"seen.{index}": value for index, value in enumerate(self.seen)}

    def recall(self, tensors: dict[str, Tensor]) -> None:
        self.seen = [tensors[f"seen.{index}"] for index in range(len(self.layers))]
