"""MEMIT (Meng et al. 2022) with accumulated keys: the update reaches every token, nothing gates it.

Δ_i += R Kᵀ (λ E[kkᵀ] + Σ_t K_t K_tᵀ)⁻¹   with the batch's own keys in the sum
"""

from __future__ import annotations

import torch
from baselines.common import LayerByLayer
from torch import Tensor

from coachhook_fast.model_defaults import default_update_weight


class Memit(LayerByLayer):
    name = "memit"

    def prepare(self) -> None:
        width = self.added[0].delta.shape[1]
        weight = self.config.mom2_update_weight or default_update_weight(width)
        self.covariances = [self.statistics.moments[layer].double() * weight for layer in self.layers]

    def directions(self, position: int, keys: Tensor) -> Tensor:
        self.covariances[position] += keys @ keys.T
        return torch.linalg.solve(self.covariances[position], keys)

    def memory(self) -> dict[str, Tensor]:
        return {f"covariance.{index}": value for index, value in enumerate(self.covariances)}

    def recall(self, tensors: dict[str, Tensor]) -> None:
        self.covariances = [tensors[f"covariance.{index}"] for index in range(len(self.layers))]
