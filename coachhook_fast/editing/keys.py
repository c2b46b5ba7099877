"""Keys and current values of a batch at the subjects' last tokens (docs/method.md section 2, step 2).

One pass a layer, which starts before the first block whose output the previous update changed and ends after the last
edited block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.models.passes.forward import Activations, PartialModel, TokenBatch, align_rows
from coachhook_fast.request import TokenisedRequest, TokenRow


@dataclass(frozen=True)
class Readings:
    """What a pass found, one column a request.

    Attributes:
        keys: K [d, n]: ½ bare prompt + ½ mean of the contexts and paraphrases.
        outputs: [m, n], output of the block asked for in the bare prompt; None where none was.
        before_norm: [m, n], the layer's down-projection output in the bare prompt, where a post-norm follows it.
    """

    keys: Tensor
    outputs: Tensor | None
    before_norm: Tensor | None


class KeyCollector:
    """Reads keys and outputs of some texts, layer by layer, while the editor updates the layers.

    Args:
        rows: `each` a column: contexts, the bare prompt last.
        whole_prompts: keep the tokens after the lookup position. Causal attention makes them irrelevant to every
            reading, except under the `sequence` gate, whose statistics see the whole prompt.
    """

    def __init__(
        self,
        partial: PartialModel,
        layers: Sequence[int],
        rows: Sequence[TokenRow],
        *,
        each: int,
        pad_id: int,
        max_tokens: int,
        whole_prompts: bool = False,
    ) -> None:
        self.partial = partial
        self.layers = tuple(layers)
        self.contexts = each
        texts = [(row.prompt if whole_prompts else row.prompt[: row.lookup + 1], row.lookup) for row in rows]
        self.chunks = _chunks(texts, self.contexts, max_tokens, pad_id, partial.device)
        # Of each chunk: a block that no later update changes, and its output.
        self._resume: list[tuple[int, Tensor] | None] = [None] * len(self.chunks)

    @classmethod
    def of_requests(
        cls, partial: PartialModel, layers: Sequence[int], batch: Sequence[TokenisedRequest], **options: Any
    ) -> KeyCollector:
        """A column a request: its contexts and paraphrases, which are filled up with its bare prompt to as many as any
        request has, and its bare prompt."""
        most = max(len(tokens.paraphrases) for tokens in batch)
        rows = []
        for tokens in batch:
            others = tokens.paraphrases + (tokens.bare,) * (most - len(tokens.paraphrases))
            rows += [*tokens.rows[:-1], *others, tokens.bare]
        return cls(partial, layers, rows, each=len(batch[0].rows) + most, **options)

    @torch.no_grad()
    def read(self, position: int, last: int | None = None) -> Readings:
        """Readings for edited layer number `position`, after the layers before it were updated; ascending, and not
        every layer need be read. Outputs are those of block `last`, the layer's own or one behind it."""
        layer = self.layers[position]
        mixed, outputs, before_norm = [], [], []
        for index, chunk in enumerate(self.chunks):
            found = self._pass(index, chunk, layer, last)
            keys = found.keys[layer][:, chunk.lookup].unflatten(0, (-1, self.contexts))  # [requests, contexts, d]
            bare = keys[:, -1]
            mixed.append(bare if self.contexts == 1 else 0.5 * bare + 0.5 * keys[:, :-1].mean(1))
            if last is not None:
                outputs.append(self._bare(found.outputs[last], chunk.lookup))
            if layer in found.norm_inputs:
                before_norm.append(self._bare(found.norm_inputs[layer], chunk.lookup))
        return Readings(
            keys=torch.cat(mixed).T,
            outputs=torch.cat(outputs).T if outputs else None,
            before_norm=torch.cat(before_norm).T if before_norm else None,
        )

    def _bare(self, hidden: Tensor, column: int) -> Tensor:
        return hidden[self.contexts - 1 :: self.contexts, column]

    def _pass(self, index: int, chunk: TokenBatch, wanted: int, last: int | None) -> Activations:
        """Runs one chunk from before the first block that may have changed, and keeps the next starting point."""
        keep = {block for block in (wanted - 1, last) if block is not None and block >= 0}
        _, found = self.partial.run(
            chunk.columns(0),
            resume=self._resume[index],
            until=wanted if last is None else last,
            keys=[wanted],
            outputs=sorted(keep),
            places=chunk.places(),
        )
        if wanted > 0:
            self._resume[index] = (wanted - 1, found.outputs[wanted - 1])
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
        _, found = partial.run(chunk.columns(0), until=last, outputs=[last], places=chunk.places())
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
