"""The tokens of a step of the target optimisation one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from coachhook_fast.models.passes.block_masks import BlockMasks, select_masks
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.models.passes.fused_parts import Part, computed_by, fused_parts
from coachhook_fast.models.passes.packed_attention import Packing, attention_modules, packed_attention
from coachhook_fast.models.passes.padded_rows import PaddedRows
from coachhook_fast.models.placement import computing_device
from coachhook_fast.ops import extension_available


@dataclass(frozen=True)
class PackedRows:
    """Rows one behind the other, without padding: no token is computed that no row has.

    Attributes:
        attention: attention modules of the blocks above `last`; parts: what these blocks compute by operators of ours.
        input_ids, position_ids: [1, S]; hidden: [S, m] clean output of block `last`.
        packing: where the rows begin, and the keys and values before them.
    """

    partial: PartialModel
    last: int
    attention: list[nn.Module]
    parts: list[Part]
    input_ids: Tensor
    position_ids: Tensor
    hidden: Tensor
    packing: Packing
    masks: BlockMasks

    @classmethod
    def of(cls, padded: PaddedRows, attention: list[nn.Module]) -> PackedRows:
        """The same rows, packed. `attention`: see `packed_modules`."""
        tokens, masks = padded.tokens, padded.masks
        assert masks is not None
        real = tokens.attention_mask[:, tokens.lookup :].bool()  # the lookup column first, padding last
        above = slice(padded.last + 1, None)
        dtype = torch.promote_types(padded.hidden.dtype, torch.float32)
        is_fp32 = padded.hidden.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        parts = fused_parts(padded.partial.blocks[above]) if is_fp32 else []
        return cls(
            padded.partial,
            padded.last,
            attention,
            parts,
            input_ids=tokens.input_ids[:, tokens.lookup :][real][None],
            position_ids=tokens.position_ids[:, tokens.lookup :][real][None],
            hidden=padded.hidden[real],
            packing=Packing(
                _starts(real.sum(1)),
                real.shape[1],
                tuple(keys.to(dtype).contiguous() for keys in padded.cache.keys[above]),
                tuple(values.to(dtype).contiguous() for values in padded.cache.values[above]),
            ),
            masks=masks,
        )

    def logits(self, shifts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        starts = self.packing.cu_seqlens
        hidden = self.hidden.index_add(0, starts[:-1], shifts.to(self.hidden.dtype))
        at = starts[rows] + columns
        partial, last_block = self.partial, len(self.partial.blocks) - 1
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        with (
            packed_attention(self.attention, self.packing),
            computed_by(self.parts),
            partial.gathered_logits(torch.zeros_like(at), at),
            partial.ffns_at(at.unique(), blocks=[last_block]),  # what else it answers is read by nobody
        ):
            result, _ = partial.run(inputs, resume=(self.last, hidden[None]), masks=self.masks)
        logits: Tensor = result.logits[0]
        return logits

    def select(self, kept: Tensor) -> PackedRows:
        packing = self.packing
        lengths = packing.cu_seqlens.diff()
        tokens = torch.isin(torch.repeat_interleave(lengths), kept)
        return replace(
            self,
            input_ids=self.input_ids[:, tokens],
            position_ids=self.position_ids[:, tokens],
            hidden=self.hidden[tokens],
            packing=Packing(
                _starts(lengths[kept]),
                packing.max_seqlen,
                tuple(keys[kept] for keys in packing.keys),
                tuple(values[kept] for values in packing.values),
            ),
            masks=select_masks(self.masks, kept),
        )


def packed_modules(partial: PartialModel, last: int, whole_rows: bool) -> list[nn.Module] | None:
    """The attention modules above block `last` where rows can be packed: on CPU (a GPU's steps are recorded, for which
    sizes must stay) with the operator in C++, in known families, whose blocks treat tokens by themselves but in
    attention; else None."""
    above = partial.blocks[last + 1 :]
    if whole_rows or not above or not partial.layout.ffns(partial.model):
        return None
    if not extension_available() or not _on_cpu(above):
        return None
    return attention_modules(above)


def _on_cpu(blocks: Sequence[nn.Module]) -> bool:
    return all(
        computing_device(module, parameter.device).type == "cpu"
        for block in blocks
        for module in block.modules()
        for parameter in module.parameters(recurse=False)
    )


def _starts(lengths: Tensor) -> Tensor:
    """[N + 1] where each of some rows begins, and where the last ends."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
