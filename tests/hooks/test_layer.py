"""HookLinear: the drop-in module around any down-projection."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.hooks.gate import SequenceContext
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.ops.reference import gated_linear as reference

M, D, RANK = 24, 40, 3


def delta(seed: int = 0, rank: int = RANK, m: int = M, d: int = D) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    R, X = torch.randn(m, rank, generator=generator), torch.randn(d, rank, generator=generator)
    return LowRankDelta.zeros(m, d).append(R, X / d**0.5)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(3)).to(dtype)


def median_threshold(x: Tensor, edits: LowRankDelta) -> float:
    """Between two norms, so that rounding moves no decision."""
    values = edits.norms(x.float()).flatten().sort().values
    return float((values[len(values) // 2 - 1] + values[len(values) // 2]) / 2)


class Callable(nn.Module):
    """A base of which only the call is known."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = D, M
        self.inner = nn.Linear(D, M)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def bases() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(D, M), nn.Linear(D, M, bias=False), Conv1D(M, D), Callable()]


@pytest.mark.parametrize("base", bases(), ids=lambda base: type(base).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adds_the_delta_to_gated_tokens_only(base: nn.Module, dtype: torch.dtype) -> None:
    base = copy.deepcopy(base).to(dtype)
    hook, edits, x = HookLinear(base), delta(), inputs(2, 9, dtype=dtype)
    threshold = median_threshold(x, edits)
    hook.set_delta(edits, threshold)
    assert hook.delta.dtype == dtype
    out, plain, fire = hook(x), base(x), hook.trace(x).fire
    assert fire.sum() == 9
    assert torch.equal(out[~fire], plain[~fire])
    correction = x.double() @ hook.get_delta_weight().double().T
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(out[fire].double(), (plain.double() + correction)[fire], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("base", bases(), ids=lambda base: type(base).__name__)
def test_no_edits_no_cost(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    hook, x = HookLinear(base), inputs(5)
    sentinel = object()
    monkeypatch.setattr(base, "forward", lambda given: sentinel if given is x else None)
    assert hook(x) is sentinel  # the base's own answer: nothing in between
    hook.set_delta(delta(), 0.0)
    hook.mode = "off"
    assert hook(x) is sentinel


def test_the_base_weight_is_shared_and_untouched() -> None:
    base = nn.Linear(D, M)
    pointer, version, before = base.weight.data_ptr(), base.weight._version, base.weight.clone()
    hook = HookLinear(base)
    hook.set_delta(delta(), 0.0)
    hook(inputs(4, 4))
    assert hook.base is base
    assert base.weight.data_ptr() == pointer
    assert base.weight._version == version
    assert torch.equal(base.weight, before)
    assert set(hook.state_dict()) == {"weight", "bias"}  # a checkpoint of an edited model is its base's
    assert [name for name, _ in hook.named_parameters()] == ["weight", "bias"]
    assert hook.weight is base.weight
    assert hook.bias is base.bias


def test_always_adds_it_everywhere() -> None:
    hook, x = HookLinear(nn.Linear(D, M)), inputs(3, 5)
    hook.set_delta(delta(), 1e9)
    hook.mode = "always"
    torch.testing.assert_close(hook(x), hook.base(x) + x @ hook.get_delta_weight().T)


def test_hooks_of_the_user_still_fire_on_the_base() -> None:
    base = nn.Linear(D, M)
    hook, x = HookLinear(base), inputs(4)
    hook.set_delta(delta(), 0.0)
    expected = hook(x)
    seen: list[Any] = []
    handle = base.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(hook(x), expected)
    assert len(seen) == 1
    handle.remove()


def test_sequence_gate_reads_the_context() -> None:
    hook, x, edits = HookLinear(nn.Linear(D, M), gate="sequence"), inputs(2, 9), delta()
    hook.set_delta(edits, 1.0)
    context = SequenceContext()
    context.mask = torch.ones(2, 9, dtype=torch.bool)
    context.mask[1, :4] = False
    hook.context = context
    trace = hook.trace(x)
    alone = HookLinear(hook.base, gate="sequence")
    alone.set_delta(edits, 1.0)
    torch.testing.assert_close(alone.trace(x[1:, 4:]).z, trace.z[1:, 4:])
    assert bool(trace.z[1, :4].isnan().all())
    assert not bool(trace.fire[1, :4].any())
    fire, _, _ = reference.sequence_gate(trace.norm, torch.tensor(1.0), context.mask)
    assert torch.equal(trace.fire, fire)
    changed = (hook(x) - hook.base(x)).abs().amax(-1) > 0
    assert torch.equal(changed, fire)
    context.mask = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"context\.mask"):
        hook(x)


def test_trace_under_calibrated_uses_the_moments() -> None:
    hook, x, edits = HookLinear(nn.Linear(D, M)), inputs(6), delta()
    hook.set_delta(edits, 1.0)
    assert bool(hook.trace(x).z.isnan().all())
    hook.set_delta(edits, 1.0, moments=(0.5, 0.25))
    trace = hook.trace(x)
    torch.testing.assert_close(trace.z, (trace.norm - 0.5) / 0.25)
    torch.testing.assert_close(trace.norm, edits.norms(x))
    assert not bool(HookLinear(nn.Linear(D, M)).trace(x).fire.any())


@pytest.mark.parametrize("base", bases(), ids=lambda base: type(base).__name__)
def test_a_relative_threshold_is_a_share_of_the_key(base: nn.Module) -> None:
    hook, edits, x = HookLinear(base), delta(), inputs(2, 9)
    x[:, ::2] *= 20  # long keys, of the same directions
    share = edits.norms(x) / x.norm(dim=-1)
    values = share.flatten().sort().values
    tau = float((values[8] + values[9]) / 2)
    hook.set_delta(edits, tau, moments=(0.1, 0.2), relative=True)
    fire = share >= tau
    expected = base(x) + fire[..., None] * (x @ edits.dense().T)
    torch.testing.assert_close(hook(x), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    trace = hook.trace(x)
    assert torch.equal(trace.fire, fire)
    torch.testing.assert_close(trace.norm, share)
    torch.testing.assert_close(trace.z, (share - 0.1) / 0.2)
    torch.testing.assert_close(hook(3 * x) - base(3 * x), 3 * (hook(x) - base(x)), rtol=1e-4, atol=1e-4)
    state = hook.double().served.state  # moved, and still relative
    assert state.relative
    assert torch.equal(hook.trace(x.double()).fire, fire)
    hook.float()
    with pytest.raises(ValueError, match="relative"):
        HookLinear(base, gate="sequence").set_delta(edits, 1.0, relative=True)


def test_gradients_pass_a_relative_gate() -> None:
    hook, edits = HookLinear(nn.Linear(D, M)), delta()
    x = inputs(2, 6).requires_grad_()
    share = (edits.norms(x.detach()) / x.detach().norm(dim=-1)).flatten().sort().values
    hook.set_delta(edits, float((share[5] + share[6]) / 2), relative=True)
    fire = hook.trace(x).fire
    assert int(fire.sum()) == 6
    grad = torch.randn(2, 6, M)
    hook(x).backward(grad)
    expected = grad @ hook.base.weight + (grad @ edits.dense()) * fire[..., None]
    torch.testing.assert_close(x.grad, expected)


def test_nothing_raises_on_nan() -> None:
    x = inputs(2, 5)
    x[0, 2] = float("nan")
    for gate in ("calibrated", "sequence"):
        hook = HookLinear(nn.Linear(D, M), gate=gate)
        hook.set_delta(delta(), 1.0)
        out = hook(x)
        assert bool(out[0, 2].isnan().all())
        assert not bool(out[1].isnan().any())


def test_copies_and_moves() -> None:
    hook, x = HookLinear(nn.Linear(D, M)), inputs(4)
    hook.set_delta(delta(), median_threshold(x, delta()))
    twin = copy.deepcopy(hook)
    torch.testing.assert_close(twin(x), hook(x))
    expected = hook(x)
    twin.set_delta(delta(1), 0.0)
    assert torch.equal(hook(x), expected)
    hook.double()
    assert hook.delta.dtype == torch.float64
    torch.testing.assert_close(hook(x.double()).float(), expected)
    assert hook.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert hook.served.state.threshold.dtype == torch.float32  # the threshold keeps the norm's precision


def test_large_ranks_are_decided_in_two_stages() -> None:
    m, d = 260, 1400
    base, edits = nn.Linear(d, m), delta(0, 200, m, d)
    x = torch.randn(64, d, generator=torch.Generator().manual_seed(3))
    x[::9] *= 5
    threshold = 2.5 * float(edits.norms(x).median())
    one, two = HookLinear(base, miss_probability=None), HookLinear(base)
    for hook in (one, two):
        hook.set_delta(edits, threshold)
    assert one.served.state.sketch is None
    assert two.served.state.sketch is not None
    torch.testing.assert_close(one(x), two(x), rtol=1e-5, atol=1e-6 * float(one(x).abs().max()))
    again = HookLinear(base)
    again.set_delta(edits, threshold)
    assert torch.equal(again.served.state.sketch, two.served.state.sketch)  # type: ignore[arg-type]


def test_gradients_flow_through_base_and_delta() -> None:
    hook, edits = HookLinear(nn.Linear(D, M)), delta()
    x = inputs(2, 6).requires_grad_()
    hook.set_delta(edits, median_threshold(x.detach(), edits))
    fire = hook.trace(x).fire
    grad = torch.randn(2, 6, M)
    hook(x).backward(grad)
    expected = grad @ hook.base.weight + (grad @ edits.dense()) * fire[..., None]
    torch.testing.assert_close(x.grad, expected)
    weight_grad = hook.base.weight.grad
    torch.testing.assert_close(weight_grad, grad.reshape(-1, M).T @ x.detach().reshape(-1, D))


@pytest.mark.parametrize(("gate", "relative"), [("calibrated", False), ("calibrated", True), ("sequence", False)])
def test_one_graph_serves_every_step_and_every_content(gate: str, relative: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    hook = HookLinear(nn.Linear(D, M), gate=gate)
    hook.set_delta(delta(), 1.0, relative=relative)
    compiled = torch.compile(hook, fullgraph=True, backend=counter)
    with torch.inference_mode():
        for step in range(4):
            x = inputs(2, 6) + step
            assert torch.equal(compiled(x), hook(x))
            hook.set_delta(delta(step), 1.0 + 0.1 * step, relative=relative)  # the same shapes, other contents
    assert counter.frame_count == 1


@pytest.mark.parametrize("relative", [False, True])
def test_inference_and_autocast(relative: bool) -> None:
    hook, x = HookLinear(nn.Linear(D, M)), inputs(2, 6)
    with torch.inference_mode():
        hook.set_delta(delta(), 0.1 if relative else 0.5, relative=relative)
        inferred = hook(x)
    leaf = x.clone().requires_grad_()
    hook(leaf).sum().backward()  # what was set under inference_mode serves training too
    torch.testing.assert_close(hook(x), inferred)
    with torch.autocast("cpu", torch.bfloat16):
        assert hook(x).dtype == torch.bfloat16
        torch.testing.assert_close(hook(x).float(), inferred, rtol=5e-2, atol=5e-2)


def test_a_swap_is_seen_whole_or_not_at_all() -> None:
    hook, x = HookLinear(nn.Linear(D, M)), inputs(8)
    sets = [(delta(seed), 0.0) for seed in (0, 1)]
    answers = []
    for edits, threshold in sets:
        hook.set_delta(edits, threshold)
        answers.append(hook(x))
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for edits, threshold in sets:
                hook.set_delta(edits, threshold)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(200):
            out = hook(x)
            assert any(torch.equal(out, answer) for answer in answers)
    finally:
        stop.set()
        thread.join()


def test_errors_name_the_argument() -> None:
    base = nn.Linear(D, M)
    with pytest.raises(ValueError, match="gate must be one of"):
        HookLinear(base, gate="perhaps")
    with pytest.raises(ValueError, match="index must not be negative"):
        HookLinear(base, index=-1)
    with pytest.raises(ValueError, match="miss_probability"):
        HookLinear(base, miss_probability=0.9)
    with pytest.raises(TypeError, match="in_features and out_features, got ReLU"):
        HookLinear(nn.ReLU())
    hook = HookLinear(base)
    hook.set_delta(delta(), 1.0)
    with pytest.raises(ValueError, match=r"delta must be \[24, 40\], got \[24, 41\]"):
        hook.set_delta(LowRankDelta.zeros(M, D + 1), 1.0)
    with pytest.raises(ValueError, match="threshold must be a number"):
        hook.set_delta(delta(1), float("nan"))
    with pytest.raises(ValueError, match="mode must be one of"):
        hook.mode = "sometimes"
    assert hook.threshold == 1.0
