"""Launches recorded once serve other tensors: by hand in the interpreter, and by csrc/cuda/replay.cpp on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, between, problem
from torch import Tensor

from coachhook_fast.ops import build_info
from coachhook_fast.ops import gated_linear_cuda as cuda
from coachhook_fast.ops.reference import gated_linear as reference
from coachhook_fast.ops.sketch import make_sketch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

library = torch.ops.coachhook
needs_cuda = pytest.mark.skipif(not build_info().get("cuda"), reason="the extension was built without csrc/cuda")
KINDS = (
    "factored",
    "dense",
    "sketched",
    "sketched dense",
    "relative",
    "relative sketched",
    "masked",
    "batch",
    "packed",
    "state",
)


def arguments(kind: str, dtype: torch.dtype, tokens: int, seed: int) -> tuple[Any, ...]:
    """Those of ``gated_linear``; the same shapes for every seed, other values, and others that fire."""
    x, weight, bias, U, B = problem(tokens, 72, 264, 40, dtype, dense="dense" in kind, seed=seed)
    x = x.roll(seed, dims=0)
    gate, mask, bounds, state, sketch = "calibrated", None, None, None, None
    norm = reference.delta_norm(x, B)
    threshold = between(norm)
    if "sketched" in kind:
        sketch = make_sketch(B, 1e-9, rows=24)
    if "relative" in kind:
        gate, threshold = "relative", between(norm / reference.key_length(x))
    if kind == "masked":
        mask = torch.arange(tokens, device=DEVICE) % 7 != seed
    if kind in ("batch", "packed", "state"):
        gate, threshold = "sequence", torch.tensor(1.2, device=DEVICE)
    if kind == "packed":
        bounds = torch.tensor([0, 3 + seed, 3 + seed, tokens - 2 - seed], device=DEVICE)
    if kind in ("batch", "state"):
        x = x.reshape(2, tokens // 2, -1)
        mask = torch.arange(tokens, device=DEVICE).reshape(2, -1) % 7 != seed
    if kind == "state":
        state = torch.tensor([[9.0, float(norm.mean()), 1.0 + seed]] * 2, device=DEVICE)
    return x, weight, bias, U, B, threshold, sketch, gate, mask, bounds, state


@pytest.fixture(autouse=True)
def sketches_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the product."""
    monkeypatch.setattr(cuda, "EXACT", 0)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert theirs[1].any()
    assert not theirs[1].all()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Gets (recording, buffers) of the calls within."""
    from coachhook_fast.kernels.launches import recording

    calls: list[Any] = []

    @contextmanager
    def kept() -> Iterator[Any]:
        with recording() as launches:
            yield lambda buffers, is_overlapped=False: calls.append((launches, buffers))

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "kept", kept)
        patch.setattr(cuda, "decodes", lambda *_: False)
        yield calls


def repeat(recording: Any, buffers: Any, others: list[Tensor | None]) -> None:
    """The launches again, on other tensors, with scratch of their own."""
    named = [*others, *(torch.empty_like(made) for made in recording.scratch)]

    def pointed(argument: Any, place: Any) -> Any:
        if not isinstance(argument, Tensor) or place.buffer < 0:
            return argument
        owner = named[place.buffer]
        at, size = owner.storage_offset() * owner.element_size() + place.offset, argument.element_size()
        assert at % size == 0
        return torch.empty(0, dtype=argument.dtype, device=DEVICE).set_(owner.untyped_storage(), at // size, (1,), (1,))

    for launch, places in zip(recording.launches, recording.places(buffers), strict=True):
        values = [pointed(*pair) for pair in zip(launch.arguments, places, strict=True)]
        launch.kernel[launch.grid](*values, **launch.constants)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_recorded_serves_other_tensors(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (arguments(kind, dtype, 22, seed) for seed in (0, 1))
    with recorded(monkeypatch) as calls:
        assert_same(cuda.gated_linear(*first), cuda.gated_linear(*first))
        expected = cuda.gated_linear(*second)
    recording, buffers = calls[0]
    x, weight, bias, U, B, threshold, sketch, _, mask, bounds, state = second
    out = torch.nn.functional.linear(x, weight, bias).flatten(0, -2)
    fire, after = torch.empty_like(buffers.fire), torch.empty_like(buffers.after)
    repeat(recording, buffers, [x, out, U, B, threshold, sketch, mask, bounds, state, fire, after])
    assert_same((out.view_as(expected[0]), fire.view_as(expected[1]), after), expected)


def test_a_call_that_can_be_replayed_leaves_small_fp32_products_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from coachhook_fast.kernels import delta_norm

    call = arguments("factored", torch.float32, 22, 0)
    for large, launches in ((1 << 62, 3), (0, 2)):
        monkeypatch.setattr(delta_norm, "LARGE_FP32", 0)
        monkeypatch.setattr(delta_norm, "LARGE_FP32_RECORDED", large)
        with recorded(monkeypatch) as calls:
            cuda.gated_linear(*call)
        recording, buffers = calls[0]
        assert len(recording.launches) == launches
        assert (recording.places(buffers) is None) == (launches == 2)


@pytest.mark.parametrize("why", ["cast", "copy", "shared"])
def test_calls_that_need_more_than_launches_are_not_recorded(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, U, B, threshold, *rest = arguments("factored", torch.bfloat16, 22, 0)
    if why == "cast":
        U, B = U.float(), B.float()
    elif why == "copy":
        x = x.T.contiguous().T
    else:
        both = torch.cat([U.flatten(), B.flatten()])
        U, B = both[: U.numel()].view_as(U), both[U.numel() :].view_as(B)
    with recorded(monkeypatch) as calls:
        cuda.gated_linear(x, weight, bias, U, B, threshold, *rest)
    recording, buffers = calls[0]
    assert recording.launches
    assert recording.places(buffers) is None


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(20, torch.bfloat16), (70, torch.float16), (600, torch.bfloat16), (40, torch.float32)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_call_of_a_kind_is_made_without_python(
    kind: str, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [arguments(kind, dtype, tokens, seed) for seed in range(4)]
    bases = [torch.nn.functional.linear(*call[:3]) for call in calls]
    with monkeypatch.context() as one_launch:
        one_launch.setattr(cuda, "decodes", lambda *_: False)  # what is not to be replayed might take it
        linear = [library.gated_linear_triton(*call) for call in calls]
    delta = [library.gated_delta_triton(base, call[0], *call[3:]) for base, call in zip(bases, calls, strict=True)]
    assert_same(library.gated_linear(*calls[0]), linear[0])
    assert_same(library.gated_delta(bases[0], calls[0][0], *calls[0][3:]), delta[0])

    def used(*_: Any) -> None:
        raise AssertionError("Python was asked again")

    monkeypatch.setattr(cuda, "_delta", used)
    for call, base, one, other in zip(calls[1:], bases[1:], linear[1:], delta[1:], strict=True):
        kept = base.clone()
        assert_same(library.gated_linear(*call), one)
        assert_same(library.gated_delta(base, call[0], *call[3:]), other)
        assert torch.equal(base, kept)
    with torch.cuda.stream(torch.cuda.Stream()):
        ours = library.gated_linear(*calls[1])
        torch.cuda.current_stream().synchronize()
    assert_same(ours, linear[1])
    with pytest.raises(AssertionError, match="asked again"):  # another kind: one token less
        library.gated_linear(calls[0][0].flatten(0, -2)[:-1], *calls[0][1:8])


@pytest.mark.gpu
@needs_cuda
def test_a_refused_call_leaves_its_kind_new(monkeypatch: pytest.MonkeyPatch) -> None:
    call = arguments("factored", torch.bfloat16, 74, 0)
    honest, asked = cuda._delta, []

    def fails_once(*parts: Any) -> Any:
        asked.append(len(asked))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return honest(*parts)

    monkeypatch.setattr(cuda, "_delta", fails_once)
    with pytest.raises(KeyboardInterrupt):
        library.gated_linear(*call)
    expected = library.gated_linear(*call)
    assert_same(library.gated_linear(*call), expected)
    assert len(asked) == 2, "the call that was refused, and the one that was recorded"


@pytest.mark.gpu
@needs_cuda
def test_a_base_that_takes_long_has_a_stream_of_its_own_in_a_replay_too() -> None:
    weight = torch.randn(4096, 16384, device="cuda").bfloat16() / 128
    B = torch.randn(12, 16384, device="cuda").bfloat16() / 128
    U = torch.linalg.qr(torch.randn(4096, 12, device="cuda"))[0].bfloat16().contiguous()
    for seed in range(3):
        x = torch.randn(2048, 16384, device="cuda").bfloat16()
        x[seed::50] *= 4
        rest = (U, B, between(reference.delta_norm(x, B)))
        assert_same(library.gated_linear(x, weight, None, *rest), library.gated_linear_triton(x, weight, None, *rest))
