"""Keys and current values of a batch at the subjects' last tokens (METHOD.md section 2, step 2).

One pass a layer, which starts before the first block whose output the previous update changed and ends after the last
edited block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook_fast.forward import PartialModel, Recorded, TokenBatch, align_rows
from coachhook_fast.request import TokenisedRequest, TokenRow


@dataclass(frozen=True)
class Readings:
    """What a pass found, one column a request.

    Attributes:
        keys: K [d, n]: ½ bare prompt + ½ mean of the contexts.
        outputs: [m, n], output of the last block to be edited in the bare prompt; None for a layer behind it.
        before_norm: [m, n], the layer's down-projection output in the bare prompt, where a post-norm follows it.
    """

    keys: Tensor
    outputs: Tensor | None
    before_norm: Tensor | None


class KeyCollector:
    """Reads keys and outputs of one batch, layer by layer, while the editor updates the layers.

    Args:
        last: the block whose outputs are read, one of `layers`.
        whole_prompts: keep the tokens after the lookup position. Causal attention makes them irrelevant to every
            reading, except under the `sequence` gate, whose statistics see the whole prompt.
    """

    def __init__(
        self,
        partial: PartialModel,
        layers: Sequence[int],
        batch: Sequence[TokenisedRequest],
        *,
        last: int,
        pad_id: int,
        max_tokens: int,
        whole_prompts: bool,
    ) -> None:
        self.partial = partial
        self.layers, self.last = tuple(layers), last
        self.contexts = len(batch[0].rows)
        rows = [(row.prompt, row.lookup) for tokens in batch for row in tokens.rows]
        if not whole_prompts:
            rows = [(prompt[: lookup + 1], lookup) for prompt, lookup in rows]
        self.chunks = _chunks(rows, self.contexts, max_tokens, pad_id, partial.device)
        self._resume: list[Tensor | None] = [None] * len(self.chunks)

    @torch.no_grad()
    def read(self, position: int) -> Readings:
        """Readings for edited layer number `position`, after the layers before it were updated."""
        layer = self.layers[position]
        mixed, outputs, before_norm = [], [], []
        for index, chunk in enumerate(self.chunks):
            found = self._pass(index, chunk, position, wanted=layer)
            keys = found.keys[layer][:, chunk.lookup].unflatten(0, (-1, self.contexts))  # [requests, contexts, d]
            bare = keys[:, -1]
            mixed.append(bare if self.contexts == 1 else 0.5 * bare + 0.5 * keys[:, :-1].mean(1))
            if layer <= self.last:
                outputs.append(self._bare(found.outputs[self.last], chunk.lookup))
            if layer in found.norm_inputs:
                before_norm.append(self._bare(found.norm_inputs[layer], chunk.lookup))
        return Readings(
            keys=torch.cat(mixed).T,
            outputs=torch.cat(outputs).T if outputs else None,
            before_norm=torch.cat(before_norm).T if before_norm else None,
        )

    def _bare(self, hidden: Tensor, column: int) -> Tensor:
        return hidden[self.contexts - 1 :: self.contexts, column]

    def _pass(self, index: int, chunk: TokenBatch, position: int, wanted: int) -> Recorded:
        """Runs one chunk from before the block that the last update changed, and keeps the next starting point."""
        start = self.layers[position - 1] - 1 if position > 0 else -1
        held = self._resume[index]
        resume = (start, held) if held is not None and start >= 0 else None
        keep = ({self.last} if wanted <= self.last else set()) | ({wanted - 1} if wanted > 0 else set())
        _, found = self.partial.run(
            chunk.columns(0),
            resume=resume,
            until=max(self.last, wanted),
            keys=[wanted],
            outputs=sorted(keep),
        )
        self._resume[index] = found.outputs.get(wanted - 1)
        return found


def bare_outputs(
    partial: PartialModel, last: int, batch: Sequence[TokenisedRequest], *, pad_id: int, max_tokens: int
) -> Tensor:
    """[m, n], output of block `last` at the subjects' last tokens of the bare prompts, with the hooks as they are."""
    return outputs_at(partial, last, [tokens.bare for tokens in batch], pad_id=pad_id, max_tokens=max_tokens)


@torch.no_grad()
def outputs_at(partial: PartialModel, last: int, rows: Sequence[TokenRow], *, pad_id: int, max_tokens: int) -> Tensor:
    """[m, rows], output of block `last` at the lookup positions of `rows`, with the hooks as they are."""
    parts = []
    for chunk in _chunks([(row.prompt, row.lookup) for row in rows], 1, max_tokens, pad_id, partial.device):
        _, found = partial.run(chunk.columns(0), until=last, outputs=[last])
        parts.append(found.outputs[last][:, chunk.lookup])
    return torch.cat(parts).T


def _chunks(
    rows: Sequence[tuple[Sequence[int], int]], group: int, max_tokens: int, pad_id: int, device: torch.device
) -> list[TokenBatch]:
    """Padded batches of whole groups of `group` rows, in order, of at most `max_tokens` (one group at least)."""
    chunks: list[TokenBatch] = []
    start = 0
    while start < len(rows):
        stop = start + group
        while stop < len(rows) and _padded_size(rows[start : stop + group]) <= max_tokens:
            stop += group
        part = rows[start:stop]
        chunks.append(align_rows([row for row, _ in part], [lookup for _, lookup in part], pad_id, device))
        start = stop
    return chunks


def _padded_size(rows: Sequence[tuple[Sequence[int], int]]) -> int:
    before = max(lookup for _, lookup in rows)
    after = max(len(row) - lookup for row, lookup in rows)
    return len(rows) * (before + after)
