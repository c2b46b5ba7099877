"""An edited vLLM layer's preallocated buffers: writing an edit set into them, and whether it fits."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.ops.sketch import make_sketch


def write_edits(layer: Any, delta: LowRankDelta, threshold: float) -> None:
    """Copies this rank's share of an edit set into the layer's buffers, in place.

    Raises:
        ValueError: the buffers hold another form or a smaller rank (see `reserve_rank`).
    """
    check_room(layer, delta)
    B, U, rank = layer.coachhook_B, layer.coachhook_U, delta.B.shape[0]
    start = get_tensor_model_parallel_rank() * B.shape[1] if layer.tp_size > 1 else 0
    B.zero_()
    B[:rank].copy_(delta.B[:, start : start + B.shape[1]])
    if U is not None and delta.U is not None:
        U.zero_()
        U[:, :rank].copy_(delta.U)
    layer.coachhook_threshold.fill_(threshold)
    if layer.coachhook_sketch is not None:
        layer.coachhook_sketch.copy_(make_sketch(B, 1e-9))


def check_room(layer: Any, delta: LowRankDelta) -> None:
    """ValueError where the layer's buffers hold another form or shape, or a smaller rank (see `reserve_rank`)."""
    B, U = layer.coachhook_B, layer.coachhook_U
    columns = B.shape[1] * max(layer.tp_size, 1)
    if delta.in_features != columns:
        raise ValueError(f"edits of {delta} do not fit a layer of {columns} input features")
    if (U is None) != (delta.U is None) or delta.B.shape[0] > B.shape[0]:
        held = "a dense delta" if U is None else f"rank {B.shape[0]}"
        raise ValueError(f"edits of {delta} do not fit the buffers of {held}: start vLLM with a larger reserve_rank")
