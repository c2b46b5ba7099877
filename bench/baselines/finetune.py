"""Plain fine-tuning of the same layers: Adam on the new answers' likelihood, batch after batch, no constraint.

Settings as ROME's baseline FT: learning rate 5e-4, at most 25 steps a batch, stop below a loss of 1e-2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from baselines.common import Baseline
from torch.nn import functional as F

from coachhook_fast.models.passes.forward import align_rows, frozen
from coachhook_fast.request import EditRequest

LEARNING_RATE = 5e-4
STEPS = 25
STOP_LOSS = 1e-2


class FineTune(Baseline):
    name = "finetune"

    def edit(self, requests: Sequence[EditRequest]) -> None:
        """Trains Δ of all edited layers on the bare prompts; the optimiser starts afresh with every batch."""
        rows = [tokens.bare for tokens in self.tokenise(requests)]
        texts = [[*row.prompt, *row.target] for row in rows]
        # Aligned at the last prompt token, so that padding stands on both sides and is masked.
        batch = align_rows(texts, [len(row.prompt) - 1 for row in rows], self.pad_id, self.partial.device)
        labels = torch.full_like(batch.input_ids, -100)
        for index, row in enumerate(rows):
            labels[index, batch.lookup + 1 : batch.lookup + 1 + len(row.target)] = torch.tensor(row.target)
        deltas = [module.delta.requires_grad_() for module in self.added]
        adam = torch.optim.Adam(deltas, lr=LEARNING_RATE)
        try:
            with frozen(self.model):
                for _ in range(STEPS):
                    logits = self.model(**batch.columns(0), use_cache=False).logits[:, :-1].float()
                    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
                    if loss.item() < STOP_LOSS:
                        break
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
        finally:
            for delta in deltas:
                delta.requires_grad_(False)
                delta.grad = None
