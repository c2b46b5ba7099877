"""The layout of a model whose family no row names: its blocks, and in each the linear layer from the FFN to the stream.

Widths tell it: the FFN's is named in the config, and no other layer of a block goes from it to the model's width, but
for attention where heads add up to the FFN's width, which its class gives away. Where more than one layer would do, or
blocks differ, nothing is taken.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from coachhook_fast.models.architectures import Layout, down_projection_size, text_config

logger = logging.getLogger("coachhook")

# What configs call the width of a dense FFN.
_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "d_ff",
    "ffn_hidden_size",
    "intermediate_size_mlp",
    "d_inner",
    "shared_intermediate_size",
)
_NOT_FFN = re.compile(
    "attn|attention|mamba|mixer|conv|expert|router|vision|audio|adapter|lora|base_layer|original_module", re.IGNORECASE
)
_HOW = (
    "Name its modules in EditConfig: layer_module_tmp='model.layers.{}' (a transformer block) and "
    "rewrite_module_tmp='model.layers.{}.mlp.down_proj' (its FFN down-projection), with {} for the number"
)


def found_layout(model: nn.Module) -> Layout:
    """The layout that the model's structure shows; what is taken is logged.

    Raises:
        ValueError: there is no list of as many blocks as the config says, or none or several layers of a block could be
            its down-projection; the message names them.
    """
    from coachhook_fast.models.architectures import LAYOUTS

    config = text_config(model)
    kind = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    unknown = f"architecture {kind!r} is not known (known: {', '.join(sorted(LAYOUTS))})"
    count, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not _NOT_FFN.search(name)
    ]
    found = {name: _down_projections(model.get_submodule(name), config, width) for name in lists}
    found = {name: paths for name, paths in found.items() if paths}
    if len(found) != 1:
        where = (
            f"blocks could be {sorted(found)}"
            if found
            else f"no list of its {count} blocks has an FFN of linear layers"
        )
        raise ValueError(f"{unknown}, and {where}. {_HOW}")
    blocks, paths = next(iter(found.items()))
    if len(paths) > 1:
        raise ValueError(f"{unknown}, and its down-projection could be any of {sorted(paths)}. {_HOW}")
    layout = Layout(f"{blocks}.{{}}", f"{blocks}.{{}}.{next(iter(paths))}")
    logger.warning(
        "architecture %r is not known: %s is taken for the down-projection of its blocks",
        kind,
        layout.rewrite_module_tmp,
    )
    return layout


def _down_projections(blocks: Any, config: Any, width: int | None) -> set[str]:
    """Paths within a block of linear layers from the FFN's width to the model's, in any block."""
    ffn_widths = {value for name in _WIDTHS if isinstance(value := getattr(config, name, None), int)}
    if width is not None and not ffn_widths:
        ffn_widths = {4 * width}
    return {
        name
        for block in blocks
        for name, module in block.named_modules()
        if not _NOT_FFN.search(name)
        and not _within_other(block, name)
        and _size(module) in {(width, w) for w in ffn_widths}
    }


def _within_other(block: nn.Module, name: str) -> bool:
    """Whether a module around it is called after something that is no FFN."""
    parts = name.split(".")
    around = [block.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    return any(_NOT_FFN.search(type(module).__name__) for module in around)


def _size(module: nn.Module) -> tuple[int, int] | None:
    try:
        return down_projection_size(module)
    except (ValueError, TypeError):
        return None
