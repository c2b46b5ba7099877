"""csrc/cuda's kernels for few tokens against the plain definition in fp64, through the dispatcher."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_as_good, between, problem
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from coachhook_fast.ops import build_info
from coachhook_fast.ops.reference import gated_linear as reference
from coachhook_fast.ops.sketch import make_sketch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not build_info().get("cuda"), reason="the extension was built without csrc/cuda"),
]

library = torch.ops.coachhook
HALVES = (torch.bfloat16, torch.float16)
# tokens, m, d, r: both sides of every bound between the kernels' variants, odd sizes, rows that end within a tile
SIZES = (
    (1, 37, 72, 9),
    (1, 576, 1536, 100),
    (3, 1600, 6400, 100),
    (8, 130, 1544, 33),
    (9, 64, 200, 16),
    (16, 300, 4096, 130),
    (17, 96, 264, 12),
)


def exactly(x: Tensor, parts: tuple, threshold: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, U, B = parts
    return reference.gated_linear(
        x.double(), weight.double(), bias.double(), None if U is None else U.double(), B.double(), threshold, **options
    )


def kernels_of(work) -> list[str]:
    """Those of csrc/cuda that ran, in their order."""
    work()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        work()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name.split("::")[2].split("<")[0] for event in events if event.name.startswith("void coachhook::")]


def check(x: Tensor, parts: tuple, threshold: Tensor, sketch: Tensor | None = None, **options) -> Tensor:
    """Through both operators; returns the decisions."""
    weight, bias, U, B = parts
    exact = exactly(x, parts, threshold, **options)
    plain = reference.gated_linear(x, weight, bias, U, B, threshold, **options)
    gate = {"gate": "calibrated", "mask": None, "cu_seqlens": None, "state": None} | options
    tail = (U, B, threshold, sketch, *gate.values())
    base = torch.nn.functional.linear(x, weight, bias)
    kept = base.clone()
    for ours in (library.gated_linear(x, weight, bias, *tail), library.gated_delta(base, x, *tail)):
        assert torch.equal(ours[1], exact[1])
        assert_as_good(ours[0], plain[0], exact[0])
        torch.testing.assert_close(ours[2].double(), exact[2], rtol=1e-2, atol=1e-4)
    assert torch.equal(base, kept)
    return exact[1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("tokens", "m", "d", "r"), SIZES)
def test_calibrated(dtype: torch.dtype, dense: bool, tokens: int, m: int, d: int, r: int) -> None:
    x, *parts = problem(tokens, m, d, r, dtype, dense=dense)
    threshold = between(reference.delta_norm(x, parts[3]))
    assert check(x, parts, threshold).any()
    assert not check(x, parts, 10 * threshold).any()
    assert check(x, parts, 0 * threshold).all()


@pytest.mark.parametrize(("tokens", "m", "d", "r"), SIZES)
def test_relative(tokens: int, m: int, d: int, r: int) -> None:
    x, *parts = problem(tokens, m, d, r, torch.bfloat16)
    length = reference.key_length(x)
    share = reference.delta_norm(x, parts[3]) / length
    if tokens > 1:
        x[-1] = 0  # a key of zeros does not fire
    check(x, parts, between(share[: max(1, tokens - 1)]), gate="relative")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 7, 8, 16])
def test_sequence(dtype: torch.dtype, tokens: int) -> None:
    x, *parts = problem(tokens, 100, 520, 20, dtype)
    x = x[:, None]
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(tokens, 1, generator=generator) > 0.2).cuda()
    count = torch.randint(0, 30, (tokens,), generator=generator).float()
    norms = reference.delta_norm(x, parts[3]).flatten().cpu()
    state = torch.stack([count, norms * 0.8 * (count > 0), count * 0.3], dim=1).cuda()
    for options in ({}, {"mask": mask}, {"state": state}, {"mask": mask, "state": state}):
        exact = exactly(x, parts, torch.tensor(0.37, device="cuda"), gate="sequence", **options)
        assert exact[2].shape == (tokens, 3)
        check(x, parts, torch.tensor(0.37, device="cuda"), gate="sequence", **options)


@pytest.mark.parametrize("tokens", [1, 6, 16])
@pytest.mark.parametrize("dense", [False, True])
def test_two_stages_decide_like_one(tokens: int, dense: bool) -> None:
    x, *parts = problem(tokens, 400, 1024, 300, torch.bfloat16, dense=dense)
    sketch = make_sketch(parts[3], 1e-9)
    assert sketch is not None
    threshold = between(reference.delta_norm(x, parts[3]))
    check(x, parts, threshold, sketch)
    check(x, parts, 50 * threshold, sketch)  # nobody asks for B
    x[0, 3] = float("nan")
    out, fire, _ = library.gated_linear(x, *parts, threshold, sketch, "calibrated", None, None, None)
    assert not bool(fire[0])
    assert bool(out[0].isnan().all())
    if tokens > 1:
        assert not bool(out[1:].isnan().any())


@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_other_layouts(tokens: int) -> None:
    """A weight stored [d, m] (Conv1D), x a slice of something wider, U by columns, a base without bias, a mask."""
    x, weight, bias, U, B = problem(tokens, 104, 520, 24, torch.bfloat16)
    threshold = between(reference.delta_norm(x, B))
    wide = torch.cat([x, x], dim=1)[:, :520]
    stored = weight.T.contiguous().T
    columns = U.T.contiguous().T
    mask = torch.arange(tokens, device="cuda") % 3 > 0
    check(wide, (stored, bias, columns, B), threshold)
    check(wide[None], (weight, bias, U, B), threshold, mask=mask[None])
    out, fire, _ = library.gated_linear(x, weight, None, U, B, threshold, None, "calibrated", None, None, None)
    expected = library.gated_linear(x, weight, 0 * bias, U, B, threshold, None, "calibrated", None, None, None)
    assert torch.equal(out, expected[0])
    assert torch.equal(fire, expected[1])


@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_the_same_bits_again_and_in_a_graph(tokens: int) -> None:
    x, *parts = problem(tokens, 1600, 6400, 300, torch.bfloat16)
    sketch = make_sketch(parts[3], 1e-9)
    threshold = between(reference.delta_norm(x, parts[3]))

    def work() -> Tensor:
        return library.gated_linear(x, *parts, threshold, sketch, "calibrated", None, None, None)[0]

    first = work()
    for _ in range(20):
        assert torch.equal(work(), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for scale in (1.0, 0.1, 1.0):
        x.mul_(scale)
        graph.replay()
        assert torch.equal(captured, work())


@pytest.mark.parametrize(
    ("tokens", "m", "kernels"),
    [
        (1, 576, ["delta_kernel", "project_kernel"]),
        (16, 4096, ["delta_kernel", "project_kernel"]),
        (17, 4096, []),
    ],
)
def test_which_kernels_run(tokens: int, m: int, kernels: list[str]) -> None:
    x, *parts = problem(tokens, m, 1536, 100, torch.bfloat16)
    threshold = between(reference.delta_norm(x, parts[3]))
    work = lambda: library.gated_linear(x, *parts, threshold, None, "calibrated", None, None, None)  # noqa: E731
    assert kernels_of(work) == kernels


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dense", [False, True])
def test_overlapped_with_a_base_of_cublas(dtype: torch.dtype, dense: bool) -> None:
    """A weight that is stored by columns, long enough for a stream of its own."""
    x, weight, bias, U, B = problem(5, 2048, 4096, 24, dtype, dense=dense)
    threshold = between(reference.delta_norm(x, B))
    stored = (weight.T.contiguous().T, bias, U, B)
    assert check(x, stored, threshold).any()
    work = lambda: library.gated_linear(x, *stored, threshold, None, "calibrated", None, None, None)  # noqa: E731
    assert kernels_of(work) == ["delta_kernel", "correct_kernel"]
