"""CoachHooK as its authors published it (docs/method.md sections 2 and 3, traps kept): gate, α rule and λ = 15 000.

    P = W0 k + b, O = Wh k + b, M = ||O - P||, z = (M - mean M) / std M over the columns of the forward pass,
    padding included; output O where z >= α. One token alone has no std, so a cached decoding step never fires.
    α ← min(α, min over the batch of max over tokens of z), recorded on the padded prompts through the un-gated model.
    X = (C + K Kᵀ)⁻¹ K by a dense solve, C = 15 000 E[kkᵀ] + Σ K Kᵀ

Requests go through the optimisation and the key readings one at a time, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from baselines.common import AddedDelta
from baselines.memit import Memit
from torch import Tensor, nn
from torch.nn import functional as F

from coachhook_fast.config import EditConfig
from coachhook_fast.models.passes.forward import align_rows, frozen
from coachhook_fast.request import EditRequest

PUBLISHED_WEIGHT = 15_000.0
FIRST_ALPHA = 2.2


class PublishedHook(AddedDelta):
    """The validated hook, or in mode "always" the temporary one. `gate` tells evaluation to feed texts whole."""

    gate = "sequence"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(FIRST_ALPHA, dtype=torch.float64))
        self.mode = "gated"
        self.largest_z = torch.empty(0)  # per row of the last forward pass

    def forward(self, x: Tensor) -> Tensor:
        plain: Tensor = self.base_layer(x)
        if not self.active:
            return plain
        edited = plain + F.linear(x, self.delta.to(x.dtype))
        norm = (edited - plain).norm(dim=-1)  # [B, T]
        z = torch.full_like(norm, torch.nan)  # as the std of one token gives it
        if norm.shape[-1] > 1:
            z = (norm - norm.mean(-1, keepdim=True)) / norm.std(-1, keepdim=True)
        self.largest_z = z.nan_to_num(-torch.inf).amax(-1)
        return edited if self.mode == "always" else torch.where((z >= self.alpha)[..., None], edited, plain)


class PublishedFlow(Memit):
    name = "published"
    gate = "published"
    whole_rows = True

    def __init__(self, model: Any, tokenizer: Any, config: EditConfig, corpus: Any) -> None:
        # A group of one token at most is a group of one request.
        published = config.replace(mom2_update_weight=PUBLISHED_WEIGHT, max_batch_tokens=1)
        super().__init__(model, tokenizer, published, corpus)

    def wrap(self, base_layer: nn.Module) -> PublishedHook:
        return PublishedHook(base_layer)

    def edit(self, requests: Sequence[EditRequest]) -> None:
        with frozen(self.model):
            tokens = self.tokenise(requests)
            values = self.target_values(tokens)
            collector = self.collector(tokens)
            count = len(self.layers)
            for position in range(count):
                for index, hook in enumerate(self.added):
                    hook.mode = "gated" if index < position else "always"
                readings = collector.read(position, last=self.layers[-1])
                residual = (values - readings.outputs.to(values)) / (count - position)
                directions = self.directions(position, readings.keys.double())
                self.added[position].delta += (residual.double() @ directions.T).float()
            self._lower_alphas([tokens_of.bare.prompt for tokens_of in tokens])
            for hook in self.added:
                hook.mode = "gated"

    @torch.no_grad()
    def _lower_alphas(self, prompts: Sequence[Sequence[int]]) -> None:
        for hook in self.added:
            hook.mode = "always"
        batch = align_rows(prompts, [0] * len(prompts), self.pad_id, self.partial.device)  # padded on the right
        self.partial.run(batch.columns(0), until=self.layers[-1])
        for hook in self.added:
            hook.alpha.fill_(min(float(hook.alpha), float(hook.largest_z.min())))

    def memory(self) -> dict[str, Tensor]:
        return super().memory() | {f"alpha.{index}": hook.alpha for index, hook in enumerate(self.added)}

    def recall(self, tensors: dict[str, Tensor]) -> None:
        for index, hook in enumerate(self.added):
            hook.alpha.copy_(tensors[f"alpha.{index}"])
        super().recall(tensors)
