"""Whether a model's gradients say how its loss falls: asked once, of models whose layers are not torch's own.

Target values are found by descent through the blocks above the edited ones. Some kernels of quantised layers give no
gradient, or a false one (bitsandbytes' 4-bit layers on CPU; dynamic int8): the loss then stays or rises, and the model
says nothing new. Along a true gradient g the loss changes by ‖g‖ a unit; a few passes show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.models.base_layer import base_of
from coachhook_fast.models.passes.forward import PartialModel, align_rows
from coachhook_fast.models.tensor_parallel import is_distributed
from coachhook_fast.request import TokenRow

_STEPS = (0.001, 0.005, 0.02, 0.1)  # shares of the hidden state's length: coarse weights need long ones
_RIGHT = (0.8, 1.25)  # what the loss changes by, in units of what the gradient says


def check_gradients(partial: PartialModel, last: int, row: TokenRow, *, pad_id: int) -> None:
    """Compares the loss of `row`'s first target token, along its gradient at block `last`'s output, with finite
    differences, where the model has linear layers of other kinds than torch's; once a `PartialModel`.

    Raises:
        ValueError: there is no gradient, or the loss does not follow it.
    """
    if partial.gradients_are_true:
        return
    kinds = foreign_linears(partial.model)
    if not kinds:
        partial.gradients_are_true = True
        return
    tokens = align_rows([row.prompt], [row.lookup], pad_id, partial.device)
    with torch.no_grad():
        _, kept = partial.run(tokens.columns(0), until=last, outputs=[last])
    hidden, at = kept.outputs[last], torch.tensor([0], device=partial.device)

    def loss(shift: Tensor) -> Tensor:
        shifted = hidden.index_add(1, at + tokens.lookup, shift.to(hidden.dtype)[None, None])
        with partial.gathered_logits(at, at + len(row.prompt) - 1):
            result, _ = partial.run(tokens.columns(0), resume=(last, shifted))
        return -result.logits[0, 0].double().log_softmax(-1)[row.target[0]]

    length = float(hidden[0, tokens.lookup].double().norm())
    shift = torch.zeros(hidden.shape[-1], dtype=torch.float32, device=hidden.device, requires_grad=True)
    try:
        with torch.enable_grad():
            gradient = torch.autograd.grad(loss(shift), shift)[0]
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{_refusal(kinds)}: they have none ({str(error).splitlines()[0]})") from error
    slope = float(gradient.double().norm())
    if not 0 < slope < float("inf"):
        raise ValueError(f"{_refusal(kinds)}: it is {slope}")
    ratios = []
    with torch.no_grad():
        for share in _STEPS:
            step = gradient / slope * share * length
            change = float(loss(step) - loss(-step)) / (2 * share * length * slope)
            if _RIGHT[0] < change < _RIGHT[1]:
                partial.gradients_are_true = True
                return
            ratios.append(f"{change:.2g}")
    raise ValueError(f"{_refusal(kinds)}: along it the loss changes by {', '.join(ratios)} times what it says")


def foreign_linears(model: nn.Module) -> list[str]:
    """Kinds of linear layers in `model` that are not torch's or transformers' own over a plain weight."""
    kinds = set()
    for module in map(base_of, model.modules()):
        if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
            continue
        weight: Any = getattr(module, "weight", None)
        if type(module) is nn.Linear and (type(weight) is nn.Parameter or is_distributed(weight)):
            continue
        own = type(module).__name__
        kinds.add(own if type(module) is not nn.Linear else f"{own} of {type(weight).__name__}")
    return sorted(kinds)


def _refusal(kinds: list[str]) -> str:
    return (
        f"the model's gradient cannot be trusted, through {', '.join(kinds)}, so that no target value can be found "
        "(edit the model that is not quantised, and load_edits(..., check=False) here)"
    )
