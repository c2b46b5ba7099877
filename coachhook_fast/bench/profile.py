"""What an edit set costs a model of one's own: seconds and memory of a pass, edited beside unedited.

Both models have the same weights; passes run in turns, so that what else the machine does slows both alike. A prefill
reads `prompt_tokens` tokens a row, a decode step one more behind them, as generate() makes it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.bench.decode_step import decode_step
from coachhook_fast.bench.gated_memory import peak_bytes
from coachhook_fast.bench.rows import machine, quantile, timed
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.hooks.load_edits import load_edits
from coachhook_fast.hooks.shared_weights import shared_weight_copy
from coachhook_fast.models.loading import context_length

Work = Callable[[], Tensor]
_MOST_TOKENS = 4096  # of the text, where the context has no end


@dataclass(frozen=True)
class Side:
    """One model's passes: median and quantiles in seconds, and the most bytes that a pass holds beside the weights."""

    seconds: float
    p20: float
    p80: float
    peak_bytes: int


@dataclass(frozen=True)
class Cost:
    """One kind of pass.

    Attributes:
        work: "prefill" or "decode step"; batch: rows; tokens: tokens a row, those in the cache included.
        ratio: edited ÷ unedited, the median over the turns' own ratios: below 1.02 nobody notices.
    """

    work: str
    batch: int
    tokens: int
    unedited: Side
    edited: Side
    ratio: float


@dataclass(frozen=True)
class Profile:
    """All costs of an edit set.

    Attributes:
        edits, layers, ranks: how many facts, in which blocks, with how many columns of Δ in each.
        held_bytes: what the edits hold beside the weights for as long as they are loaded; weight_bytes: the weights.
        firing: share of the text's tokens at which some layer takes the edited output; of as many as the context holds.
        machine: what it was measured on.
    """

    edits: int
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    held_bytes: int
    weight_bytes: int
    firing: float
    costs: tuple[Cost, ...]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def profile(
    model: nn.Module,
    tokenizer: Any,
    edits: str | Path,
    *,
    text: str | None = None,
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int = 128,
    seconds: float = 5.0,
) -> Profile:
    """Times a model with and without an edit set.

    Args:
        model: without hooks; it is as before afterwards.
        edits: folder of a saved edit set, or "hf:owner/name".
        text: what the passes read, over and over; None takes the edits' own prompts, at which they fire.
        batches: rows a pass.
        prompt_tokens: tokens a row; cut to what the model's context holds.
        seconds: about how long each kind of pass is timed.

    Raises:
        ValueError: the model has hooks, the text has no token, a number is not positive, or the edit set is not of this
            model; RuntimeError: with its edits off the edited model does not give the unedited one's bits.

    Example:
        >>> found = profile(model, tokenizer, "edits/")
        >>> [(cost.work, cost.batch, round(cost.ratio, 3)) for cost in found.costs]
        [('prefill', 1, 1.012), ('decode step', 1, 1.018), ('prefill', 8, 1.009), ('decode step', 8, 1.016)]
    """
    for name, value in (("batches", min(batches, default=0)), ("prompt_tokens", prompt_tokens), ("seconds", seconds)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    edited = shared_weight_copy(model)
    load_edits(edited, edits)
    handle: Any = edited.coachhook
    edit_set: EditSet = handle.edit_set
    if text is None:
        text = "\n".join(request.text for batch in edit_set.batches for request in batch.requests)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"text must have a token, got {text[:80]!r}")
    limit = context_length(model)
    tokens = min(prompt_tokens, (limit or prompt_tokens + 1) - 1)
    device = handle.hooks[0].delta.device
    with torch.inference_mode():
        try:
            _check_off(model, edited, _tokens(ids, 1, tokens).to(device))
            firing = _firing(edited, _tokens(ids, 1, min(len(ids), limit or _MOST_TOKENS)).to(device))
            held = sum(map(_held, handle.hooks))
            costs = tuple(
                cost
                for batch in batches
                for cost in _costs(model, edited, _tokens(ids, batch, tokens + 1).to(device), seconds)
            )
        finally:
            handle.unload()
    return Profile(
        edits=edit_set.num_edits,
        layers=edit_set.layers,
        ranks=tuple(delta.rank for delta in edit_set.deltas),
        held_bytes=held,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        firing=firing,
        costs=costs,
        machine=machine(),
    )


def _tokens(ids: Sequence[int], batch: int, count: int) -> Tensor:
    """[batch, count] of `ids`, over and over; every row begins elsewhere."""
    at = torch.arange(batch)[:, None] * (len(ids) // batch + 1) + torch.arange(count)
    return torch.tensor(ids)[at % len(ids)]


def _check_off(plain: Any, edited: Any, tokens: Tensor) -> None:
    with edited.coachhook.disabled():
        if not torch.equal(edited(tokens).logits, plain(tokens).logits):
            raise RuntimeError("with its edits off the edited model answers otherwise than the unedited one")


def _firing(edited: Any, tokens: Tensor) -> float:
    """Share of the tokens at which the gate of some edited layer opens."""
    fired = torch.zeros(tokens.shape, dtype=torch.bool)

    def look(hook: HookLinear, inputs: tuple[Tensor, ...]) -> None:
        fired.logical_or_(hook.trace(inputs[0]).fire.reshape(tokens.shape).cpu())

    handles = [hook.register_forward_pre_hook(look) for hook in edited.coachhook.hooks]
    try:
        edited(tokens)
    finally:
        for each in handles:
            each.remove()
    return float(fired.float().mean())


def _held(hook: HookLinear) -> int:
    sketch = hook.served.state.sketch
    return hook.delta.nbytes + (0 if sketch is None else sketch.nbytes)


def _costs(plain: nn.Module, edited: nn.Module, tokens: Tensor, seconds: float) -> Iterator[Cost]:
    """`tokens` [batch, n + 1]: a prefill of n, a step behind them."""
    batch, count = tokens.shape[0], tokens.shape[1] - 1
    for work, make in (("prefill", _prefill), ("decode step", decode_step)):
        sides: list[Work] = [make(model, tokens) for model in (plain, edited)]
        taken = timed(sides, seconds)
        unedited, ours = (
            Side(statistics.median(each), quantile(each, 0.2), quantile(each, 0.8), peak_bytes(side))
            for each, side in zip(taken, sides, strict=True)
        )
        ratio = statistics.median(b / a for a, b in zip(*taken, strict=True))
        yield Cost(work, batch, count + (work != "prefill"), unedited, ours, ratio)


def _prefill(model: Any, tokens: Tensor) -> Work:
    prompt = tokens[:, :-1].contiguous()

    def once() -> Tensor:
        logits: Tensor = model(prompt, use_cache=True).logits
        return logits

    return once


def write_png(found: Profile, path: str | Path) -> None:
    """A chart of each pass's seconds, unedited beside edited. ValueError where matplotlib (the extra `plot`) is not
    installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a PNG needs matplotlib: pip install 'coachhook-fast[plot]'") from error
    figure = Figure(figsize=(7.0, 1.4 + 0.7 * len(found.costs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, cost in enumerate(found.costs):
        for side, shift, colour in ((cost.unedited, -0.18, "#9aa5b1"), (cost.edited, 0.18, "#1f6feb")):
            spread = [[1e3 * (side.seconds - side.p20)], [1e3 * (side.p80 - side.seconds)]]
            axes.barh(place + shift, 1e3 * side.seconds, 0.34, xerr=spread, color=colour)
        axes.text(1e3 * cost.edited.p80, place + 0.18, f"  × {cost.ratio:.3f}", va="center", fontsize=9)
    axes.set_yticks(range(len(found.costs)), [f"{cost.work}, batch {cost.batch}" for cost in found.costs])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds (median; lines: 20 % to 80 %)")
    axes.set_title(f"unedited (grey), {found.edits} edits (blue), {found.machine['device']}", fontsize=10)
    figure.savefig(path, dpi=150, format="png")
