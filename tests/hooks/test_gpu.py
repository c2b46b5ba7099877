"""What only a GPU proves: HookLinear through the dispatcher, operators checked, autocast, compiled, in a CUDA graph.

`make gpu-check` runs it. The kernels themselves are compared with the plain definition in test_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.hooks.layer import HookLinear

pytestmark = pytest.mark.gpu

M, D, RANK = 96, 200, 12


def hook_and_twin(tokens: int, dtype: torch.dtype, *, relative: bool = False) -> tuple[HookLinear, HookLinear, Tensor]:
    """A hook on the GPU, the same one in fp64 on the CPU, and tokens of which every fifth fires."""
    generator = torch.Generator().manual_seed(tokens)
    base = nn.Linear(D, M)
    R, X = torch.randn(M, RANK, generator=generator), torch.randn(D, RANK, generator=generator) / D**0.5
    delta = LowRankDelta.zeros(M, D).append(R, X)
    delta = delta.to(dtype=dtype).to(dtype=torch.float64)  # what the dtype holds, for both
    x = torch.randn(tokens, D, generator=generator).to(dtype)
    measured = delta.norms(x.double()) / (x.double().norm(dim=1) if relative else 1.0)
    values = torch.cat([measured.new_zeros(1), measured.sort().values])
    at = 1 + tokens * 4 // 5
    gap = int((values[at:] - values[at - 1 : -1]).argmax()) + at  # rounding moves no decision
    threshold = float(values[gap] + values[gap - 1]) / 2
    ours, twin = HookLinear(base.to("cuda", dtype)), HookLinear(nn.Linear(D, M).double())
    twin.base.load_state_dict({name: value.double().cpu() for name, value in base.state_dict().items()})
    ours.set_delta(delta.to(dtype=dtype, device="cuda"), threshold, relative=relative)
    twin.set_delta(delta, threshold, relative=relative)
    return ours, twin, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 100, 600])  # each way of the dispatch table
@pytest.mark.parametrize("relative", [False, True])
def test_a_hook_gives_the_same_as_on_the_cpu(dtype: torch.dtype, tokens: int, relative: bool) -> None:
    ours, twin, x = hook_and_twin(tokens, dtype, relative=relative)
    with torch.inference_mode():
        found, expected, plain = ours(x.cuda()).cpu().double(), twin(x.double()), twin.base(x.double())
    changed = (expected - plain).norm(dim=1) > 0
    assert changed.any()
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps
    correction = expected - plain
    shares = ((found - plain) * correction).sum(dim=1)[changed] / correction.square().sum(dim=1)[changed]
    assert (shares - 1).abs().max() < 0.1


@pytest.mark.parametrize("gate", ["calibrated", "relative", "sequence"])
def test_opcheck(gate: str) -> None:
    x, weight, bias = torch.randn(2, 6, D), torch.randn(M, D) / D**0.5, torch.randn(M)
    U, B = torch.linalg.qr(torch.randn(M, RANK))[0].contiguous(), torch.randn(RANK, D) / D**0.5
    x, weight, bias, U, B = (part.cuda() for part in (x, weight, bias, U, B))
    mask, state = (torch.rand(2, 6).cuda() > 0.2, torch.rand(2, 3).cuda()) if gate == "sequence" else (None, None)
    tail = (U, B, torch.tensor(0.9, device="cuda"), None, gate, mask, None, state)
    leaf, library = x.clone().requires_grad_(), torch.ops.coachhook
    torch.library.opcheck(library.gated_linear.default, (leaf, weight, bias, *tail))
    torch.library.opcheck(library.gated_delta.default, (torch.nn.functional.linear(x, weight, bias), leaf, *tail))
    torch.library.opcheck(library.delta_norm.default, (x, B))


def test_gradients_are_those_of_the_cpu() -> None:
    ours, twin, x = hook_and_twin(40, torch.float32)
    leaves = x.cuda().detach().clone().requires_grad_(), x.double().requires_grad_()
    for hook, leaf in zip((ours, twin), leaves, strict=True):
        hook(leaf).square().sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    torch.testing.assert_close(leaves[0].grad.cpu().double(), leaves[1].grad, rtol=1e-4, atol=1e-4)


def test_autocast_moves_no_decision() -> None:
    ours, twin, x = hook_and_twin(40, torch.float32)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        found = ours(x.cuda())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu().double(), twin(x.double()), rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("tokens", [1, 100, 600])
def test_a_cuda_graph_replays_with_other_tokens(tokens: int) -> None:
    ours, _, x = hook_and_twin(tokens, torch.bfloat16)
    placed = x.cuda()
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            ours(placed)  # kernels are compiled outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ours(placed)
        placed.copy_(placed.flip(0) * 1.5)
        graph.replay()
        assert torch.equal(captured, ours(placed))


@pytest.mark.parametrize("tokens", [1, 600])
def test_compiles_without_a_break(tokens: int) -> None:
    ours, _, x = hook_and_twin(tokens, torch.bfloat16)
    compiled = torch.compile(ours, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x.cuda()), ours(x.cuda()), rtol=2e-2, atol=2e-2)
