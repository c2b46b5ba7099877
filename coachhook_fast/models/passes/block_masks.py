"""Attention masks as the blocks of a model get them: taken from one pass, given to others over the same tokens.

A step that is repeated then builds none. On a GPU building them asks the device for answers (is anything padded?) or
copies from the host, neither of which a CUDA graph can hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

_NAME = "attention_mask"

# Of each block; None where the model gives it none.
BlockMasks = tuple[Tensor | None, ...]


@contextmanager
def taken_masks(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """The masks that `blocks` get in a pass within it, in order; fewer than blocks where some do not name it."""
    taken: list[Any] = []

    def take(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = _place(block)
        if _NAME in kwargs:
            taken.append(kwargs[_NAME])
        elif place is not None and place < len(args):
            taken.append(args[place])

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(take, with_kwargs=True).remove)
        yield taken


@contextmanager
def given_masks(blocks: Sequence[nn.Module], masks: BlockMasks) -> Iterator[None]:
    """Within it the blocks get `masks`, whatever the model gives them."""
    with ExitStack() as stack:
        for block, mask in zip(blocks, masks, strict=True):
            stack.callback(block.register_forward_pre_hook(_giving(mask), with_kwargs=True).remove)
        yield


def select_masks(masks: BlockMasks, rows: Tensor) -> BlockMasks:
    """The masks of some rows; blocks that share one share it still."""
    distinct = {id(mask): mask for mask in masks if mask is not None}
    selected = {key: mask[rows.to(mask.device)] for key, mask in distinct.items()}
    return tuple(None if mask is None else selected[id(mask)] for mask in masks)


def _giving(mask: Tensor | None) -> Any:
    def give(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place = _place(block)
        if _NAME in kwargs or place is None:
            return args, {**kwargs, _NAME: mask}
        return (*args[:place], mask, *args[place + 1 :]), kwargs

    return give


def _place(block: nn.Module) -> int | None:
    """Position of the mask among the arguments of a block that names it."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    return names.index(_NAME) if _NAME in names else None
