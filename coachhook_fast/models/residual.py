"""What a block makes of its down-projection's output, where its family is not known: asked of the model itself.

An edit that is to change the block's output by R changes the down-projection's by R: right where the block adds that
output as it is, off by a factor where it multiplies it first, and wrong where a norm or a gate of the token's own
follows. A pass over a few tokens with something added to that output shows which.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coachhook_fast.models.passes.forward import PartialModel, frozen

_TOKENS = 8
_AGREEMENT = 0.1  # most of what may be left of the change beside a multiple of what was added: rounding, in bf16 too


@torch.no_grad()
def check_residual(partial: PartialModel, layers: Sequence[int]) -> float:
    """The factor by which the blocks `layers` take their down-projection's output, the same in all.

    Raises:
        ValueError: what a block adds is no multiple of that output; or the blocks' factors differ.
    """
    layout, model = partial.layout, partial.model
    if layout.is_known or layout.post_norm_tmp is not None:
        return layout.gain(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.arange(_TOKENS, device=partial.device)[None] % vocabulary
    inputs = {"input_ids": ids, "position_ids": torch.arange(_TOKENS, device=partial.device)[None]}
    with frozen(model):
        gains = {layer: _gain(partial, inputs, layer) for layer in layers}
    for layer, gain in gains.items():
        if gain is None:
            raise ValueError(
                f"block {layer} does not add the output of {layout.rewrite_module_tmp.format(layer)} to its hidden "
                "states: a norm or a gate follows, or it is another layer; name another (rewrite_module_tmp)"
            )
    found = [gain for gain in gains.values() if gain is not None]
    if max(found) - min(found) > _AGREEMENT * max(map(abs, found)):
        raise ValueError(f"blocks multiply their down-projection's output by different factors: {gains}")
    mean = sum(found) / len(found)
    return 1.0 if abs(mean - 1) < _AGREEMENT / 5 else mean


def _gain(partial: PartialModel, inputs: dict[str, Tensor], layer: int) -> float | None:
    """The factor of one block; None where there is none."""
    plain = _output(partial, inputs, layer)
    added = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain)
    added *= plain.norm(dim=-1, keepdim=True) / added.norm(dim=-1, keepdim=True)
    down = partial.layout.down_projection(partial.model, layer)
    handle = down.register_forward_hook(lambda _, __, output: output + added.reshape(output.shape).to(output))
    try:
        change = _output(partial, inputs, layer) - plain
    finally:
        handle.remove()
    gain = (change * added).sum() / added.square().sum()
    left = (change - gain * added).norm() / (gain * added).norm().clamp(min=torch.finfo(added.dtype).tiny)
    return float(gain) if float(left) < _AGREEMENT and abs(float(gain)) > 1e-3 else None


def _output(partial: PartialModel, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """[N, T, m] in fp32 at least."""
    _, recorded = partial.run(inputs, until=layer, outputs=[layer])
    return recorded.outputs[layer].to(torch.promote_types(recorded.outputs[layer].dtype, torch.float32))
