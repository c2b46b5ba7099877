"""`coachhook bench gated-linear`: the gated projection against the plain one and the published hook, and its memory.

Every row's answer is checked before it is timed. Candidates are timed in turns, so that a busy machine slows all.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.bench import rows as common
from coachhook_fast.delta import LowRankDelta
from coachhook_fast.layer import HookLinear
from coachhook_fast.sketch import UNDECIDED, sketch_rows

SHAPES = {"gpt2-xl": (1600, 6400), "gpt-j": (4096, 16384), "llama-3-8b": (4096, 14336)}  # m, d
RANKS: tuple[int | str, ...] = (10, 100, 1000, "full")
TOKENS = (1, 8, 64, 128, 512)
EDITS = (100, 1000, 10_000)  # for the memory rows
SHARE = 0.02  # of gated tokens, where nothing else is said
# Norms of ordinary tokens, log-normal like real text's: a threshold of mean + 4 std is 3.4 times the mean, and a
# sketch of 64 rows leaves about 9 % undecided (docs/method.md section 4 measured 3.2 to 4 times, and 7 to 12 %).
SPREAD = 0.55
TEXT = (
    "The river rises in the hills north of the town and flows for sixty miles to the sea. In the spring of 1874 the "
    "first bridge was built of timber; it was replaced in stone ten years later, when the railway came. "
)
SECONDS = 1.0  # spent on timing one row, at least five turns


def random_delta(m: int, d: int, rank: int | str, dtype: torch.dtype) -> LowRankDelta:
    """A delta of the given rank with a flat spectrum, at half a percent of the base's size."""
    scale = 0.005 / d**0.5
    if rank == "full":
        return LowRankDelta(None, (torch.randn(m, d) * scale).to(dtype))
    U = torch.linalg.qr(torch.randn(m, int(rank)))[0].contiguous()
    return LowRankDelta(U.to(dtype), (torch.randn(int(rank), d) * scale * (m / int(rank)) ** 0.5).to(dtype))


def keys(tokens: int, d: int, dtype: torch.dtype) -> Tensor:
    """``[tokens, d]`` whose delta norms spread like real text's."""
    size = torch.exp(SPREAD * torch.randn(tokens, 1) - 0.5 * SPREAD**2)
    return (torch.randn(tokens, d) * size).to(dtype)


def arrange(hook: HookLinear, delta: LowRankDelta, x: Tensor, gated: int, relative: bool = False) -> None:
    """Set tau at mean + 4 std of ordinary norms, and scale ``x`` so that its first `gated` tokens pass it.

    relative: tau of ``||Delta k|| / ||k||`` instead, which no length changes; nothing passes it then.
    """
    if relative:
        if gated:
            raise ValueError(f"gated must be 0 where tau is relative, got {gated}")
        hook.set_delta(delta, 2 * float((delta.norms(x) / x.norm(dim=1)).max()), relative=True)
        return
    mean = float(delta.norms(keys(512, x.shape[1], torch.float32)).mean())
    tau = mean * (1 + 4 * (torch.exp(torch.tensor(SPREAD**2)) - 1).sqrt().item())
    hook.set_delta(delta, tau)
    norms = delta.norms(x)
    target = torch.minimum(norms, torch.tensor(0.9 * tau))
    target[:gated] = 1.5 * tau
    x.mul_((target / norms)[:, None].to(x.dtype))


def times(candidates: Sequence[Callable[[], Any]], seconds: float = SECONDS) -> list[list[float]]:
    """Seconds of each candidate's calls, in turns for about `seconds`."""
    spent = sum(map(sum, common.in_turns(candidates, 2))) / 2
    return common.in_turns(candidates, max(5, min(300, int(seconds / spent))))


def floor_cost(m: int, d: int, delta: LowRankDelta, share: float) -> float:
    """Multiply-adds (and bytes) over the plain projection's; docs/notes/gated-linear.md."""
    rows = delta.B.shape[0]
    sketch = sketch_rows(rows)
    measured = sketch + UNDECIDED[sketch] * rows if sketch else rows
    corrected = 0.0 if delta.is_dense else share * rows * m
    return 1.0 + (measured * d + corrected) / (m * d)


def checked(hook: HookLinear, x: Tensor, gated: int) -> bool:
    """The hook's answer against base and delta in fp64, tokens that must not change bit for bit.

    Which tokens were corrected is told from the answer itself: how much of a token's own correction is in it, which
    half precision, where one entry's rounding is as large, does not hide over a whole row.
    """
    out, plain, delta = hook(x), hook.base_layer(x), hook.delta
    norm = delta.norms(x.double())
    if hook.served.state.relative:
        norm = norm / x.double().norm(dim=1)
    fire = norm >= hook.threshold
    correction = x.double() @ delta.dense().double().T
    added = ((out.double() - plain.double()) * correction).sum(dim=1) / correction.square().sum(dim=1)
    expected = plain.double() + torch.where(fire[:, None], correction, 0.0)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    same = torch.equal(out[~fire], plain[~fire]) or x.is_cuda  # one kernel of ours there, not cuBLAS
    right = bool((added - fire.double()).abs().max() < 0.1) and int(fire.sum()) == gated
    return right and same and bool(error <= 32 * torch.finfo(x.dtype).eps)


def timing_rows(
    shape: str,
    rank: int | str,
    tokens: int,
    dtype: torch.dtype,
    share: float = SHARE,
    device: str = "cpu",
    relative: bool = False,
) -> Iterator[common.Row]:
    """Ours against the plain projection, and against the published hook."""
    torch.manual_seed(0)
    m, d = SHAPES[shape]
    base = nn.Linear(d, m).to(dtype=dtype, device=device).requires_grad_(False)
    delta = random_delta(m, d, rank, dtype).to(device=device)
    x = keys(tokens, d, torch.float32).to(device)
    hook = HookLinear(base)
    gated = round(share * tokens)
    arrange(hook, delta, x, gated, relative)
    x = x.to(dtype)
    published = common.baseline("published_hook").PublishedHook(base.weight, base.bias, delta.dense(), 2.2)
    with torch.inference_mode():
        right = checked(hook, x, gated)
        plain, ours, twin = times([lambda: base(x), lambda: hook(x), lambda: published(x[None])])
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
            # ours over theirs turn by turn: what another process took from one, it took from the other
            cost=statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            floor_cost=floor,
            rank=rank,
            tokens=tokens,
            gated_share=gated / tokens,
            sketch_rows=0 if hook.served.state.sketch is None else hook.served.state.sketch.shape[0],
        )


def two_stage_rows(tokens: int = 1_000_000, chunk: int = 4000) -> Iterator[common.Row]:
    """Decisions of the two-stage gate on `tokens` tokens against measuring each of them, and the undecided share."""
    torch.manual_seed(0)
    m, d = 576, 1536  # SmolLM2's, where a million exact norms take seconds
    delta = random_delta(m, d, "full", torch.float32)
    base = nn.Linear(d, m).requires_grad_(False)
    one, two = HookLinear(base, miss_probability=None), HookLinear(base)
    sketch = torch.empty(0)
    mismatches = fired = undecided = 0
    taken: tuple[list[float], list[float]] = ([], [])
    for start in range(0, tokens, chunk):
        x = keys(min(chunk, tokens - start), d, torch.float32)
        if start == 0:
            arrange(one, delta, x.clone(), 0)
            two.set_delta(delta, one.threshold)
        assert two.served.state.sketch is not None
        sketch, tau = two.served.state.sketch, two.threshold
        out = torch.zeros(x.shape[0], m)
        decisions = []
        for index, state in enumerate((one.served.state, two.served.state)):
            begin = time.perf_counter()
            _, fire, _ = torch.ops.coachhook.gated_delta(out, x, state.U, state.B, state.threshold, state.sketch)
            taken[index].append(time.perf_counter() - begin)
            decisions.append(fire)
        mismatches += int((decisions[0] != decisions[1]).sum())
        fired += int(decisions[0].sum())
        undecided += int((torch.linalg.vector_norm(x @ sketch.T, dim=-1) >= tau).sum())
    rows = sketch.shape[0] + undecided / tokens * m
    yield common.row(
        f"two-stage gate, {tokens} tokens by {chunk}",
        "all of B for every token",
        taken[1],
        taken[0],
        floor_seconds=statistics.median(taken[0]) * rows / m,
        checked=mismatches == 0 and fired > 0,
        dtype=torch.float32,
        shape=f"smollm2 {m}x{d}",
        tokens=tokens,
        fired=fired,
        decisions_that_differ=mismatches,
        undecided_share=undecided / tokens,
        sketch_rows=sketch.shape[0],
    )


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator (or the GPU's) held during `work`, above what it held before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def memory_rows(shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[common.Row]:
    """Bytes that a hook layer adds against the published twin's, and a forward pass's peak."""
    torch.manual_seed(0)
    m, d = SHAPES[shape]
    base = nn.Linear(d, m).to(dtype=dtype, device=device).requires_grad_(False)
    x = keys(512, d, dtype).to(device)
    for edits in EDITS:
        dense = min(edits, m) * (m + d) >= m * d
        delta = random_delta(m, d, "full" if dense else edits, dtype).to(device=device)
        hook = HookLinear(base)
        hook.set_delta(delta, 1e9)
        state = hook.served.state
        added = delta.nbytes + (0 if state.sketch is None else state.sketch.nbytes)
        twin = common.baseline("published_hook").PublishedHook(base.weight, base.bias, delta.dense(), 2.2)
        forwards = [functools.partial(hook, x), functools.partial(twin, x[None])]
        with torch.inference_mode():
            ours, theirs, plain = (peak_bytes(work) for work in (*forwards, functools.partial(base, x)))
            seconds, twin_seconds = times(forwards)
            right = bool(torch.equal(hook(x), base(x)))
        yield common.row(
            f"memory of a hook layer, {edits} edits; a forward of {x.shape[0]} tokens",
            "published hook",
            seconds,
            twin_seconds,
            floor_seconds=statistics.median(twin_seconds) * floor_cost(m, d, delta, 0.0) / 2.0,
            checked=right,
            dtype=dtype,
            shape=f"{shape} {m}x{d}",
            edits=edits,
            added_bytes=added,
            twin_bytes=base.weight.nbytes,
            added_share_of_twin=added / base.weight.nbytes,
            peak_forward_bytes=ours,
            published_peak_forward_bytes=theirs,
            plain_peak_forward_bytes=plain,
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
                out, plain = hook(x), hook.base_layer(x)
                correction = torch.where(fire[..., None], x @ hook.get_delta_weight().T, 0.0)
                right = torch.allclose(out, plain + correction, rtol=1e-2, atol=1e-2 * float(plain.abs().max()))
                ours, base = times([functools.partial(hook, x), functools.partial(hook.base_layer, x)])
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
    tokens: Sequence[int] = TOKENS,
    decisions: int = 1_000_000,
    model: str | None = None,
    edits: str | None = None,
) -> list[common.Row]:
    """All rows: fp32 (bf16 on a GPU), the gated shares at rank 100, memory, and the two-stage gate's decisions.

    With `model` and `edits`, the layers of that model under that edit set instead.
    """
    if (model is None) != (edits is None):
        raise ValueError(f"give both model and edits, or neither, got model={model!r}, edits={edits!r}")
    if model is not None and edits is not None:
        return list(model_rows(model, edits))
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    lengths = (*tokens, 2048, 8192) if on_gpu else tokens
    rows: list[common.Row] = []
    for shape in shapes:
        for rank in ranks:
            for length in lengths:
                rows += timing_rows(shape, rank, length, dtype, device=device)
        for length, share in ((128, 0.1), (1, 1.0)):
            rows += timing_rows(shape, 100, length, dtype, share, device)
        for length in (1, 8, 128):  # what the default of batches in turn compares, beside the rule of the other rows
            for relative in (False, True):
                rows += timing_rows(shape, 100, length, dtype, 0.0, device, relative)
        rows += memory_rows(shape, dtype, device)
    if not on_gpu:
        for length in (1, 8):
            rows += timing_rows("gpt2-xl", 100, length, torch.bfloat16)
        rows += two_stage_rows(decisions)
    return rows
