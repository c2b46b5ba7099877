"""Times the prefill ways of the gated projection on a GPU and the tile choices behind them: replays of CUDA graphs.

`python bench/tune_prefill.py` prints one line a case: plain cuBLAS, ours, their ratio, what ours adds, and the
published hook over ours (which synchronises, so it is timed by the clock). Weights and activations rotate over copies,
so that L2 is as cold as in a model. Every answer is checked in fp32 first. `--quick` is GPT-J at 2 048 tokens alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
_folder = tempfile.mkdtemp()  # the package without the root beside it, whose `kernels` would shadow transformers' own
(Path(_folder) / "coachhook_fast").symlink_to(ROOT / "coachhook_fast")
sys.path.insert(0, _folder)

from coachhook_fast.bench import rows as common  # noqa: E402
from coachhook_fast.bench.gated_linear import SHAPES, SPREAD  # noqa: E402
from coachhook_fast.kernels import delta_norm, listed  # noqa: E402
from coachhook_fast.ops import gated_linear_cuda as cuda  # noqa: E402
from coachhook_fast.sketch import make_sketch  # noqa: E402

COPIES = 4
CALLS = 8


def graph_of(call: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
    """A graph of `CALLS` calls that rotate over the copies."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            call(index % COPIES)
    return graph


def times(*calls: Callable[[int], Any], rounds: int = 7) -> list[float]:
    """Microseconds of one call of each, medians over rounds in turns."""
    graphs = [graph_of(call) for call in calls]
    taken: list[list[float]] = [[] for _ in graphs]
    for turn in range(rounds + 1):
        for graph, found in zip(graphs, taken, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                found.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return [statistics.median(found) for found in taken]


def clocked(call: Callable[[int], Any], turns: int = 12) -> float:
    """Microseconds of one call by the clock."""
    call(0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for index in range(turns):
        call(index % COPIES)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6 / turns


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def factors(m: int, d: int, rank: int | str) -> tuple[Tensor | None, Tensor]:
    scale = 0.005 / d**0.5
    if rank == "full":
        return None, (randn(m, d) * scale).bfloat16()
    U = torch.linalg.qr(randn(m, int(rank)))[0].contiguous().bfloat16()
    return U, (randn(int(rank), d) * scale * (m / int(rank)) ** 0.5).bfloat16()


def activations(tokens: int, B: Tensor) -> tuple[Tensor, Tensor]:
    """Keys whose norms spread like real text's, 2 % of them over tau = mean + 4 std, and tau."""
    x = randn(tokens, B.shape[1]) * torch.exp(SPREAD * randn(tokens, 1) - 0.5 * SPREAD**2)
    norm = (x @ B.float().T).norm(dim=1)
    tau = norm.mean() * (1 + 4 * float(torch.exp(torch.tensor(SPREAD**2)) - 1) ** 0.5)
    target = torch.minimum(norm, 0.9 * tau)
    target[torch.randperm(tokens, device="cuda")[: max(1, round(0.02 * tokens))]] = 1.5 * tau
    return (x * (target / norm)[:, None]).bfloat16(), tau


def wrong(out: Tensor, fire: Tensor, plain: Tensor, x: Tensor, U: Tensor | None, B: Tensor, tau: Tensor) -> str:
    """What is wrong with an answer; nothing: an empty string."""
    c = x.float() @ B.float().T
    expected_fire = c.norm(dim=1) >= tau
    if not torch.equal(fire, expected_fire):
        return f" WRONG: {int((fire != expected_fire).sum())} decisions"
    correction = c if U is None else c @ U.float().T
    expected = plain.float() + torch.where(fire[:, None], correction, 0.0)
    error = float((out.float() - expected).abs().max() / expected.abs().max())
    added = ((out.float() - plain.float()) * correction).sum(1)[fire] / correction.square().sum(1)[fire]
    if error > 0.02 or float((added - 1).abs().max()) > 0.1:
        return f" WRONG: error {error:.3g}, corrections {float(added.min()):.2f} to {float(added.max()):.2f}"
    return ""


def compare(quick: bool) -> None:
    for shape in ("gpt-j",) if quick else SHAPES:
        m, d = SHAPES[shape]
        weights = [(randn(m, d) / d**0.5).bfloat16() for _ in range(COPIES)]
        published: dict[int, float] = {}
        for rank in (100, "full") if quick else (10, 100, 1000, "full"):
            deltas = [factors(m, d, rank)] * COPIES
            if rank == "full":  # small factors stay in L2 in a model too, or cost little
                deltas = [(None, deltas[0][1].clone()) for _ in range(COPIES)]
            U, B = deltas[0]
            sketch = make_sketch(B, 1e-9)
            for tokens in (2048,) if quick else (128, 512, 2048, 8192):
                x, tau = activations(tokens, B)
                xs = [x, *(x.clone() for _ in range(COPIES - 1))]

                def plain(i: int, xs=xs, weights=weights) -> Tensor:
                    return torch.nn.functional.linear(xs[i], weights[i])

                def ours(
                    i: int, xs=xs, weights=weights, tau=tau, deltas=deltas, sketch=sketch, gate="calibrated"
                ) -> Any:
                    return cuda.gated_linear(xs[i], weights[i], None, *deltas[i], tau, sketch, gate)

                if tokens not in published:
                    hook = common.baseline("published_hook").PublishedHook
                    twins = [hook(w, None, torch.zeros_like(w), 2.2) for w in weights]
                    published[tokens] = clocked(lambda i, xs=xs, twins=twins: twins[i](xs[i][None]))
                    del twins
                for way in ("separate", "fused") if tokens <= 128 else ("separate",):
                    cuda.WAYS = ((float("inf"), way),)
                    out, fire, _ = ours(0)
                    note = wrong(out, fire, plain(0), x, U, B, tau)
                    base, took = times(plain, ours)
                    print(
                        f"{shape} {tokens} r={rank} {way}: plain {base:.1f} ours {took:.1f} us ratio {took / base:.3f} "
                        f"adds {took - base:.1f} published/ours {published[tokens] / took:.2f}{note}",
                        flush=True,
                    )
                if shape == "gpt-j" and tokens == 2048 and rank in (100, "full"):
                    cuda.WAYS = ((float("inf"), "separate"),)
                    relative = tau / x.float().norm(dim=1).mean()
                    base, took = times(plain, lambda i, share=relative: ours(i, tau=share, gate="relative"))
                    print(f"  relative: plain {base:.1f} ours {took:.1f} us ratio {took / base:.3f}", flush=True)
                    kernels(ours)
                    tiles(xs, deltas, sketch)


def kernels(call: Callable[[int], Any]) -> None:
    """Microseconds of each kernel of one call, run by itself."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for index in range(CALLS):
            call(index % COPIES)
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in found[:7]:
        print(
            f"  {event.self_device_time_total / CALLS:8.1f} us {event.count / CALLS:.0f}x {event.key[:70]}", flush=True
        )


def tiles(xs: list[Tensor], deltas: list[tuple[Tensor | None, Tensor]], sketch: Tensor | None) -> None:
    """The delta's product alone in other tiles, and cuBLAS's."""
    first = deltas[0][1] if sketch is None else sketch
    plain = times(lambda i: torch.mm(xs[i], first.T, out_dtype=torch.float32))[0]
    print(f"  torch.mm to fp32 of {first.shape[0]} rows: {plain:.1f} us")
    usual, usual_slices = delta_norm.blocks, delta_norm.slices
    for size, columns, inner, warps, stages, most in (
        (128, 128, 64, 8, 3, 1),
        (128, 128, 64, 8, 4, 1),
        (128, 128, 64, 8, 3, 2),
        (64, 128, 64, 4, 4, 1),
        (64, 128, 64, 4, 3, 2),
        (256, 128, 64, 8, 3, 1),
    ):
        config = {"BLOCK_T": size, "BLOCK_N": columns, "BLOCK_D": inner, "num_warps": warps, "num_stages": stages}
        delta_norm.blocks = lambda *a, config=config, **k: config
        delta_norm.slices = lambda t, d, b, programs, most=most: usual_slices(t, d, b, programs * most)
        try:
            took = f"{times(lambda i: delta_norm.project(xs[i], first))[0]:.1f} us"
        except Exception as error:  # a tile that does not fit is an answer too
            took = repr(error)[:90]
        print(f"  project {size}x{columns}x{inner} warps {warps} stages {stages} programs x{most}: {took}", flush=True)
    delta_norm.blocks, delta_norm.slices = usual, usual_slices
    if sketch is None:
        return
    usual = listed.blocks
    order = torch.randperm(xs[0].shape[0], device="cuda", dtype=torch.int32)
    for columns, inner, warps, stages in ((128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 3)):
        config = {"UNIT": 64, "BLOCK_N": columns, "BLOCK_D": inner, "num_warps": warps, "num_stages": stages}
        listed.blocks = lambda *a, config=config: config
        found = []
        for many in (50, 128, 150, 250):
            counts = torch.tensor([many, 0], device="cuda", dtype=torch.int32)
            try:
                took = times(lambda i, counts=counts: listed.project_listed(xs[i], deltas[i][1], order, counts))[0]
                found.append(f"{many}: {took:.1f}")
            except Exception as error:
                found.append(repr(error)[:60])
                break
        print(f"  listed {columns}x{inner} warps {warps} stages {stages}, us of so many tokens: {', '.join(found)}")
    listed.blocks = usual


if __name__ == "__main__":
    torch.manual_seed(0)
    started = time.perf_counter()
    print(torch.cuda.get_device_name(), torch.__version__)
    with torch.inference_mode():
        compare("--quick" in sys.argv)
    print(f"{time.perf_counter() - started:.0f} s")
