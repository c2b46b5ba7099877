"""What the rows of `coachhook bench gated-linear` are made of: deltas, keys, the check of an answer, and the floor."""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.ops.reference.gated_linear import sequence_gate, sequence_rows
from coachhook_fast.ops.sketch import UNDECIDED, sketch_rows

SHAPES = {"gpt2-xl": (1600, 6400), "gpt-j": (4096, 16384), "llama-3-8b": (4096, 14336)}  # m, d
SHARE = 0.02  # of gated tokens, where nothing else is said
# Norms of ordinary tokens, log-normal like real text's: a threshold of mean + 4 std is 3.4 times the mean, and a
# sketch of 64 rows leaves about 9 % undecided (docs/method.md section 4 measured 3.2 to 4 times, and 7 to 12 %).
SPREAD = 0.55
_CHECKED = 512  # tokens whose answer is compared entry by entry; decisions are compared for all


def random_delta(m: int, d: int, rank: int | str, dtype: torch.dtype, device: str = "cpu") -> LowRankDelta:
    """A delta of the given rank with a flat spectrum, at half a percent of the base's size."""
    scale = 0.005 / d**0.5
    if rank == "full":
        return LowRankDelta(None, torch.randn(m, d, device=device).mul_(scale).to(dtype))
    U = torch.linalg.qr(torch.randn(m, int(rank), device=device))[0].contiguous()
    B = torch.randn(int(rank), d, device=device).mul_(scale * (m / int(rank)) ** 0.5)
    return LowRankDelta(U.to(dtype), B.to(dtype))


def keys(tokens: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """``[tokens, d]`` whose delta norms spread like real text's."""
    size = torch.exp(SPREAD * torch.randn(tokens, 1, device=device) - 0.5 * SPREAD**2)
    return torch.randn(tokens, d, device=device).mul_(size).to(dtype)


def ordinary_limit(delta: LowRankDelta) -> float:
    """tau: mean + 4 std of the norms of ordinary keys."""
    mean = float(delta.norms(keys(512, delta.in_features, torch.float32, str(delta.device))).mean())
    return mean * (1 + 4 * (torch.exp(torch.tensor(SPREAD**2)) - 1).sqrt().item())


def gated_places(tokens: int, gated: int) -> Tensor:
    """Which tokens are gated: evenly spread."""
    return torch.arange(gated) * tokens // max(gated, 1)


def place(delta: LowRankDelta, x: Tensor, tau: float, gated: int) -> Tensor:
    """``x`` ``[tokens, d]``, scaled in place so that `gated` tokens pass tau with room to spare and no other does."""
    norms = delta.norms(x)
    target = norms.clamp(max=0.9 * tau)
    target[gated_places(x.shape[0], gated).to(x.device)] = 1.5 * tau
    return x.mul_((target / norms)[:, None].to(x.dtype))


def relative_limit(delta: LowRankDelta, x: Tensor) -> float:
    """A tau of ``||Delta k|| / ||k||``, which no length changes, that none of ``x`` passes."""
    return 2 * float((delta.norms(x) / x.norm(dim=1)).max())


def arrange(hook: HookLinear, delta: LowRankDelta, x: Tensor, gated: int, relative: bool = False) -> None:
    """Publish the delta at `ordinary_limit` and scale ``x`` so that `gated` tokens pass it; ValueError where tau is
    relative and any should."""
    if relative:
        if gated:
            raise ValueError(f"gated must be 0 where tau is relative, got {gated}")
        hook.set_delta(delta, relative_limit(delta, x), relative=True)
        return
    tau = ordinary_limit(delta)
    hook.set_delta(delta, tau)
    place(delta, x, tau, gated)


def decisions(hook: HookLinear, x: Tensor) -> Tensor:  # [..., d] -> [...] bool
    """Which tokens fire, by the definition in fp64."""
    norm, state = hook.delta.norms(x.double()), hook.served.state
    if hook.gate == "sequence":
        before = None if hook.context is None else hook.context.here().load(hook.index)
        grid = norm.reshape(sequence_rows(norm.shape, None, before), -1)
        return sequence_gate(grid, state.threshold, state=before)[0].reshape(norm.shape)
    return (norm / x.double().norm(dim=-1) if state.relative else norm) >= state.threshold


def checked(hook: HookLinear, x: Tensor, gated: int, out: Tensor | None = None) -> bool:
    """The hook's answer (`out`, where it is there already) against base and delta in fp64, tokens that must not change
    bit for bit.

    Which tokens were corrected is told from the answer itself: how much of a token's own correction is in it, which
    half precision, where one entry's rounding is as large, does not hide over a whole row.
    """
    out = hook(x) if out is None else out
    fire, m = decisions(hook, x).flatten(), hook.out_features
    x, out, plain = x.flatten(0, -2), out.reshape(-1, m), hook.base(x).reshape(-1, m)
    others = torch.where(fire, 1, 0).argsort(stable=True)  # those that do not fire come first
    some = torch.cat([others[: _CHECKED - _CHECKED // 4], others[-(_CHECKED // 4) :]]).unique()
    correction = x[some].double() @ hook.delta.B.double().T
    if hook.delta.U is not None:
        correction = correction @ hook.delta.U.double().T
    found, base = out[some].double(), plain[some].double()
    added = ((found - base) * correction).sum(dim=1) / correction.square().sum(dim=1)
    expected = base + torch.where(fire[some, None], correction, 0.0)
    limit = 32 * torch.finfo(x.dtype).eps
    error = (found - expected).abs().max() / expected.abs().max()
    right = bool((added - fire[some].double()).abs().max() < 0.1) and int(fire.sum()) == gated
    return right and bool(error <= limit) and unchanged(out[~fire], plain[~fire])


def unchanged(out: Tensor, plain: Tensor) -> bool:
    """Bit for bit; on a GPU, where one kernel of ours may compute the base and not cuBLAS, but for rounding."""
    if not out.is_cuda or out.numel() == 0:
        return torch.equal(out, plain)
    return bool((out - plain).abs().max() <= 32 * torch.finfo(out.dtype).eps * plain.abs().max())


def floor_cost(m: int, d: int, delta: LowRankDelta, share: float) -> float:
    """Multiply-adds (and bytes) over the plain projection's; docs/gated-linear.md."""
    rows = delta.B.shape[0]
    sketch = sketch_rows(rows)
    measured = sketch + UNDECIDED[sketch] * rows if sketch else rows
    corrected = 0.0 if delta.is_dense else share * rows * m
    return 1.0 + (measured * d + corrected) / (m * d)


def floor_seconds(
    m: int, d: int, delta: LowRankDelta, tokens: int, gated: int, rates: tuple[float, float]
) -> tuple[float, float]:
    """Seconds that the plain projection and ours take at least at `rates`, bytes and flops a second: every weight that
    is needed is read once, activations once, the output written once."""
    byte_rate, flop_rate = rates
    rows, size = delta.B.shape[0], delta.B.element_size()
    sketch = sketch_rows(rows)
    whole = not sketch or tokens * UNDECIDED[sketch] >= 1 or gated > 0  # all of B is read
    more = (sketch + rows * whole) * d + (0 if delta.is_dense or gated == 0 else rows * m)
    plain = m * d + tokens * (d + m)
    flops = 2.0 * tokens * m * d
    return (
        max(plain * size / byte_rate, flops / flop_rate),
        max((plain + more) * size / byte_rate, flops * floor_cost(m, d, delta, gated / tokens) / flop_rate),
    )
