"""Runs parts of a model: padded rows in, block outputs and keys out.

Savings that need no knowledge of a family's attention, masks or rotary embeddings, because the model's own code still
runs around them: blocks whose output is known are skipped (`resume`), a pass ends once the last wanted block has spoken
(`run(until=...)`), logits are computed where they are read (`gathered_logits`), and FFNs, most of a model's work,
compute the tokens that matter (`ffns_at`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.models.architectures import Layout
from coachhook_fast.models.base_layer import base_of
from coachhook_fast.models.passes.block_masks import BlockMasks, given_masks, taken_masks
from coachhook_fast.models.passes.products import fast_linears, replaced_forward
from coachhook_fast.models.placement import input_device
from coachhook_fast.models.tensor_parallel import column_shard


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, padded on both sides so that every row's lookup token stands in column `lookup`.

    Attributes:
        input_ids, attention_mask, position_ids: [N, T] int64; positions count real tokens only.
        lookup: the common column of the subjects' last tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    lookup: int

    def columns(self, start: int) -> dict[str, Tensor]:
        """Model inputs for the columns from `start` on, whose predecessors are in a cache."""
        return {
            "input_ids": self.input_ids[:, start:],
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids[:, start:],
        }

    def places(self, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Where in the flattened [N, stop - start] columns the tokens stand that are no padding; None where none is.
        It asks the device how many there are."""
        mask = self.attention_mask[:, start:stop]
        places = mask.flatten().nonzero()[:, 0]
        return places if places.numel() < mask.numel() else None

    def select(self, rows: Tensor) -> TokenBatch:
        return TokenBatch(self.input_ids[rows], self.attention_mask[rows], self.position_ids[rows], self.lookup)


def align_rows(rows: Sequence[Sequence[int]], lookups: Sequence[int], pad_id: int, device: torch.device) -> TokenBatch:
    """Pads `rows` left and right until all lookup tokens share a column."""
    column = max(lookups)
    width = column + max(len(row) - lookup for row, lookup in zip(rows, lookups, strict=True))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, (row, lookup) in enumerate(zip(rows, lookups, strict=True)):
        start = column - lookup
        input_ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, start : start + len(row)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return TokenBatch(input_ids.to(device), mask.to(device), positions.to(device), column)


@dataclass
class Activations:
    """What a pass was asked to keep, by block.

    Attributes:
        keys: input [N, T, d] of the down-projection.
        outputs: output [N, T, m] of the block.
        norm_inputs: with a key, input [N, T, m] of the norm after the FFN, in families that have one.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    norm_inputs: dict[int, Tensor] = field(default_factory=dict)


class _Stop(Exception):
    """Ends a pass early; never leaves this module."""


class PartialModel:
    """A model whose forward pass can start after one block and end after another."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = model
        self.layout = layout
        self.blocks = layout.blocks(model)
        self.gain = layout.gain(model)  # what a block takes its FFN's output by; the editor asks where it is not known
        self.gradients_are_true = False  # until the editor has looked
        # Most families' blocks answer the hidden state, some a tuple with it: seen whenever an output is kept, and
        # every output to resume from was kept before.
        self._answers_tuple = False

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    def run(
        self,
        inputs: dict[str, Tensor],
        *,
        resume: tuple[int, Tensor] | None = None,
        until: int | None = None,
        keys: Sequence[int] = (),
        outputs: Sequence[int] = (),
        masks: BlockMasks | None = None,
        places: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, Activations]:
        """One forward pass.

        Args:
            inputs: model inputs, see `TokenBatch.columns`.
            resume: (block, its output [N, T, m]); blocks up to it are not computed.
            until: last block to compute; the pass then ends and its result is None.
            keys: blocks whose down-projection input to keep; outputs: blocks whose output to keep.
            masks: what `masks` answered for the same tokens; the model then makes none.
            places: of the tokens that are no padding (`TokenBatch.places`); FFNs then compute no others, but where keys
                are kept or a down-projection is wrapped, by a hook layer for one.
            options: further arguments of the model's forward.
        """
        recorded = Activations()
        with fast_linears(self.model), ExitStack() as stack:
            if resume is not None:
                stack.enter_context(self._resumed(*resume))
            if places is not None and self.layout.ffn_tmp is not None:
                bare = [i for i in range(len(self.blocks)) if i not in keys and not self._is_wrapped(i)]
                stack.enter_context(self.ffns_at(places, bare))
            if masks is not None:
                stack.enter_context(given_masks(self.blocks, masks))
                # transformers passes a mask of four dimensions on as it is.
                made = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=inputs["input_ids"].device)
                inputs = {**inputs, "attention_mask": made}
            for index in keys:
                down = self.layout.down_projection(self.model, index)
                stack.enter_context(_removing(_keep_keys(down, index, recorded.keys)))
                norm = self.layout.post_norm(self.model, index)
                if norm is not None:
                    stack.enter_context(_removing(_keep_input(norm, index, recorded.norm_inputs)))
            for index in outputs:
                stack.enter_context(_removing(self._keep_output(index, recorded)))
            if until is not None:  # registered last, so that it runs after the hooks that keep outputs
                stack.enter_context(_removing(self.blocks[until].register_forward_hook(_stop)))
            try:
                result = self.model(**inputs, **{"use_cache": False, **options})
            except _Stop:
                result = None
        rows = inputs["input_ids"].shape[0]
        for kept in (recorded.keys, recorded.norm_inputs):  # some families' FFNs see all rows' tokens in one list
            kept |= {index: tensor.unflatten(0, (rows, -1)) for index, tensor in kept.items() if tensor.dim() == 2}
        return result, recorded

    def masks(self, inputs: dict[str, Tensor], hidden: Tensor, **options: Any) -> BlockMasks | None:
        """The attention masks that the model makes of `inputs` for its blocks, whose hidden states are like `hidden`
        [N, T, m]; None where it hands its blocks none, or something else, and for families that are not known, which
        may read more from the tokens' mask (ALiBi's places)."""
        if not self.layout.ffns(self.model):
            return None
        last = len(self.blocks) - 1
        with taken_masks(self.blocks) as taken:
            self.run(inputs, resume=(last, hidden), until=last, **options)
        usual = all(
            mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and len(mask) == len(hidden))
            for mask in taken
        )
        return tuple(taken) if usual and len(taken) == len(self.blocks) else None

    @contextmanager
    def gathered_logits(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        """Within it the model computes logits at the given (row, column) positions only, as [1, P, V]."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no output embeddings: not a causal language model")

        def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            hidden = args[0]
            return (hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0),)

        handle = head.register_forward_pre_hook(gather)
        with _removing(handle):
            yield

    @contextmanager
    def ffns_at(self, places: Tensor, blocks: Sequence[int]) -> Iterator[None]:
        """Within it the FFNs of `blocks`, in known families, compute only the tokens at the flat `places` and answer 0
        for others."""
        ffns = self.layout.ffns(self.model)
        with ExitStack() as stack:
            for ffn in [ffns[index] for index in blocks] if ffns else []:
                stack.enter_context(replaced_forward(ffn, _over(places, ffn.forward)))
            yield

    def _is_wrapped(self, index: int) -> bool:
        down = self.layout.down_projection(self.model, index)
        return base_of(down) is not down or hasattr(down, "base_layer")

    def _keep_output(self, index: int, recorded: Activations) -> Any:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            self._answers_tuple = isinstance(output, tuple)
            recorded.outputs[index] = output[0] if self._answers_tuple else output

        return self.blocks[index].register_forward_hook(keep)

    @contextmanager
    def _resumed(self, last: int, output: Tensor) -> Iterator[None]:
        """Blocks 0..last are passed over, and block `last` answers `output`."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks[: last + 1]):
                answer = output if index == last else None
                stack.enter_context(replaced_forward(block, _answering(answer, self._answers_tuple)))
            yield


def _keep_input(module: nn.Module, index: int, kept: dict[int, Tensor]) -> Any:
    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept[index] = args[0]

    return module.register_forward_pre_hook(keep)


def _keep_keys(down: nn.Module, index: int, kept: dict[int, Tensor]) -> Any:
    shard = column_shard(base_of(down))

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept[index] = args[0] if shard is None else shard.whole(args[0])

    return down.register_forward_pre_hook(keep)


def _answering(output: Tensor | None, as_tuple: bool) -> Any:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = hidden_states if output is None else output
        return (answer,) if as_tuple else answer

    return forward


def _over(places: Tensor, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` of the hidden states [N, T, m] at the flat `places` alone."""

    def gathered(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        here = places.to(flat.device)  # a model may stand on several devices
        found = forward(flat[here][None])[0]
        return found.new_zeros(flat.shape[0], found.shape[-1]).index_copy(0, here, found).unflatten(0, hidden.shape[:2])

    return gathered


def _stop(*_: Any) -> None:
    raise _Stop


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients of parameters within it; both as before afterwards."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
