"""`coachhook bench gated-linear`: the gated projection against the plain one and the published hook, and its memory.

Every row's answer is checked before it is timed. Candidates are timed in turns, so that a busy machine slows all. On a
GPU the rows are gated_linear_gpu.py's.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from coachhook_fast.bench import gated_linear_gpu
from coachhook_fast.bench import rows as common
from coachhook_fast.bench.gated_decisions import two_stage_rows
from coachhook_fast.bench.gated_memory import memory_rows
from coachhook_fast.bench.gated_problem import SHAPES, SHARE, arrange, checked, floor_cost, keys, random_delta
from coachhook_fast.hooks.layer import HookLinear

RANKS: tuple[int | str, ...] = (10, 100, 1000, "full")
TOKENS = (1, 8, 64, 128, 512)
TEXT = (
    "The river rises in the hills north of the town and flows for sixty miles to the sea. In the spring of 1874 the "
    "first bridge was built of timber; it was replaced in stone ten years later, when the railway came. "
)
SECONDS = 1.0  # spent on timing one row, at least five turns


def timing_rows(
    shape: str,
    rank: int | str,
    tokens: int,
    dtype: torch.dtype,
    share: float = SHARE,
    relative: bool = False,
) -> Iterator[common.Row]:
    """Ours against the plain projection, and against the published hook."""
    torch.manual_seed(0)
    m, d = SHAPES[shape]
    base = nn.Linear(d, m).to(dtype=dtype).requires_grad_(False)
    delta = random_delta(m, d, rank, dtype)
    x = keys(tokens, d, torch.float32)
    hook = HookLinear(base)
    gated = round(share * tokens)
    arrange(hook, delta, x, gated, relative)
    x = x.to(dtype)
    published = common.baseline("published_hook").PublishedHook(base.weight, base.bias, delta.dense(), 2.2)
    with torch.inference_mode():
        right = checked(hook, x, gated)
        plain, ours, twin = common.timed([lambda: base(x), lambda: hook(x), lambda: published(x[None])], SECONDS)
    floor = floor_cost(m, d, delta, gated / tokens)
    for name, theirs in (("plain projection", plain), ("published hook", twin)):
        yield common.row(
            f"gated projection{', relative' * relative}, rank {rank}, {gated} of {tokens} tokens gated",
            name,
            ours,
            theirs,
            floor_seconds=floor * statistics.median(plain),
            checked=right,
            dtype=dtype,
            shape=f"{shape} {m}x{d}",
            timing="eager",
            # ours over theirs turn by turn: what another process took from one, it took from the other
            cost=statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            floor_cost=floor,
            rank=rank,
            tokens=tokens,
            gated_share=gated / tokens,
            sketch_rows=0 if hook.served.state.sketch is None else hook.served.state.sketch.shape[0],
        )


def model_rows(model: str, edits: str, lengths: Sequence[int] = (1, 8, 64, 256)) -> Iterator[common.Row]:
    """The edited layers of the user's model and edit set, on keys of ordinary text, against the plain projection."""
    from coachhook_fast import load_edits, load_model

    network, tokenizer = load_model(model)
    load_edits(network, edits)
    ids = tokenizer(TEXT * 40, return_tensors="pt")["input_ids"][:, : max(lengths)].to(network.device)
    found: dict[HookLinear, Tensor] = {}
    hooks = [module for module in network.modules() if isinstance(module, HookLinear)]
    handles = [hook.register_forward_pre_hook(lambda at, args: found.update({at: args[0][0]})) for hook in hooks]
    with torch.inference_mode():
        network(ids)
        for handle in handles:
            handle.remove()
        for hook in hooks:
            for length in lengths:
                x = found[hook][None, :length]
                fire = hook.trace(x).fire
                out, plain = hook(x), hook.base(x)
                correction = torch.where(fire[..., None], x @ hook.get_delta_weight().T, 0.0)
                right = torch.allclose(out, plain + correction, rtol=1e-2, atol=1e-2 * float(plain.abs().max()))
                ours, base = common.timed([functools.partial(hook, x), functools.partial(hook.base, x)], SECONDS)
                state = hook.served.state
                yield common.row(
                    f"edited layer {hook.index} of {model}, {length} tokens",
                    "plain projection",
                    ours,
                    base,
                    floor_seconds=floor_cost(hook.out_features, hook.in_features, hook.delta, 0.0)
                    * statistics.median(base),
                    checked=right,
                    dtype=x.dtype,
                    shape=f"{hook.out_features}x{hook.in_features}",
                    timing="eager",
                    cost=statistics.median(a / b for a, b in zip(ours, base, strict=True)),
                    rank=hook.delta.rank,
                    tokens=length,
                    gated_share=float(fire.double().mean()),
                    added_bytes=hook.delta.nbytes + (0 if state.sketch is None else state.sketch.nbytes),
                    twin_bytes=hook.weight.nbytes,
                )


def run(
    shapes: Sequence[str] = tuple(SHAPES),
    ranks: Sequence[int | str] = RANKS,
    tokens: Sequence[int] | None = None,
    decisions: int = 1_000_000,
    model: str | None = None,
    edits: str | None = None,
) -> list[common.Row]:
    """All rows: shapes, ranks and tokens, the gated shares at rank 100, memory, and the two-stage gate's decisions.

    With `model` and `edits`, the layers of that model under that edit set instead.
    """
    if (model is None) != (edits is None):
        raise ValueError(f"give both model and edits, or neither, got model={model!r}, edits={edits!r}")
    if model is not None and edits is not None:
        return list(model_rows(model, edits))
    if torch.cuda.is_available():
        parts = gated_linear_gpu.parts(shapes, ranks, tokens or gated_linear_gpu.TOKENS, decisions)
        return [row for part in parts.values() for row in part()]
    rows: list[common.Row] = []
    dtype = torch.float32
    for shape in shapes:
        for rank in ranks:
            for length in tokens or TOKENS:
                rows += timing_rows(shape, rank, length, dtype)
        for length, share in ((128, 0.1), (1, 1.0)):
            rows += timing_rows(shape, 100, length, dtype, share)
        for length in (1, 8, 128):  # what the default of batches in turn compares, beside the rule of the other rows
            for relative in (False, True):
                rows += timing_rows(shape, 100, length, dtype, 0.0, relative)
        rows += memory_rows(shape, dtype)
    for length in (1, 8):
        rows += timing_rows("gpt2-xl", 100, length, torch.bfloat16)
    return rows + list(two_stage_rows(decisions))
