"""The Triton kernels in the interpreter against the plain definition, through the dispatch that the GPU uses."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, assert_as_good, between, problem
from torch import Tensor

from coachhook_fast.ops import gated_linear_cuda as cuda
from coachhook_fast.ops.reference import gated_linear as reference
from coachhook_fast.ops.sketch import make_sketch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = ("decode", "separate")


def check(name: str, x: Tensor, delta: tuple, threshold: Tensor, sketch: Tensor | None = None, **kw) -> None:
    weight, bias, U, B = delta
    exact = reference.gated_linear(
        x.double(), weight.double(), bias.double(), None if U is None else U.double(), B.double(), threshold, **kw
    )
    plain = reference.gated_linear(x, weight, bias, U, B, threshold, **kw)
    ours = cuda.gated_linear(x, weight, bias, U, B, threshold, sketch, **kw)
    assert torch.equal(ours[1], exact[1]), name
    assert_as_good(ours[0], plain[0], exact[0])
    torch.testing.assert_close(ours[2].double(), exact[2], rtol=1e-2 if x.dtype != torch.float32 else 1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def every_size_goes_our_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches are used, however small the product, and Triton does large ones in fp32 too."""
    from coachhook_fast.kernels import delta_norm

    monkeypatch.setattr(cuda, "EXACT", 0)
    monkeypatch.setattr(delta_norm, "LARGE_FP32", 1 << 62)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    decodes = request.param == "decode"
    monkeypatch.setattr(cuda, "decodes", lambda x, weight, B: decodes and x.dtype == weight.dtype == B.dtype)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "m", "d", "r", "dense"), [(1, 37, 70, 9, True), (19, 40, 130, 33, False)])
def test_calibrated(way: str, dtype: torch.dtype, tokens: int, m: int, d: int, r: int, dense: bool) -> None:
    x, weight, bias, U, B = problem(tokens, m, d, r, dtype, dense=dense)
    check(way, x, (weight, bias, U, B), between(reference.delta_norm(x, B)))


def test_the_same_input_gives_the_same_bits(way: str) -> None:
    x, weight, bias, U, B = problem(17, 40, 130, 20, torch.float32)
    threshold = between(reference.delta_norm(x, B))
    first, second = (cuda.gated_linear(x, weight, bias, U, B, threshold) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dense", [False, True])
def test_two_stages_decide_as_one(way: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "TWO_STAGE_DECODE_TOKENS", 64)
    x, weight, bias, U, B = problem(13, 40, 48, 36, torch.float32, dense=dense)
    threshold = between(reference.delta_norm(x, B))
    check(way, x, (weight, bias, U, B), threshold, make_sketch(B, 1e-9, rows=24))
    check(way, x, (weight, bias, U, B), threshold * 100, make_sketch(B, 1e-9, rows=24))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sketched", [False, True])
def test_relative(way: str, dtype: torch.dtype, sketched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "TWO_STAGE_DECODE_TOKENS", 64)
    x, weight, bias, U, B = problem(19, 40, 130, 33, dtype)
    x[1::3] *= 8
    tau = between(reference.delta_norm(x, B) / reference.key_length(x))
    check(way, x, (weight, bias, U, B), tau, make_sketch(B, 1e-9, rows=24) if sketched else None, gate="relative")
    assert 0 < int(reference.gated_linear(x, weight, bias, U, B, tau, "relative")[1].sum()) < 19


def test_a_threshold_is_one_number() -> None:
    x, weight, bias, U, B = problem(4, 37, 70, 9, torch.float32)
    for gate in reference.RULES:
        with pytest.raises(ValueError, match="threshold must have no dimension"):
            cuda.gated_linear(x, weight, bias, U, B, torch.ones(1, device=DEVICE), None, gate)


def test_shapes_that_the_kernels_would_read_past_are_refused() -> None:
    x, weight, bias, U, B = problem(4, 37, 70, 9, torch.float32)
    tau = torch.tensor(1.0, device=DEVICE)
    assert U is not None
    for arguments, wrong in (
        ((x[:, :-1], weight, bias, U, B, tau), "x must be"),
        ((x, weight, bias, U, B[:, :-1], tau), "x must be"),
        ((x, weight, bias, U[:, :-1], B, tau), "U must be"),
        ((x, weight, bias, U.half(), B, tau), "U must be"),
        ((x, weight[:-1], bias, U, B, tau), "weight must be"),
        ((x, weight, bias, U, B, tau, B[:, :-1]), "sketch must be"),
        ((x, weight, bias, U, B, tau, None, "calibrated", torch.ones(3, dtype=torch.bool, device=DEVICE)), "mask must"),
    ):
        with pytest.raises(ValueError, match=wrong):
            cuda.gated_linear(*arguments)
    out = x @ weight.T
    with pytest.raises(ValueError, match="out must be"):
        cuda.gated_delta(out[:-1], x, U, B, tau)
    with pytest.raises(ValueError, match="out must be"):
        cuda.correct(out[:-1], x, U, B, torch.ones(4, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="fire must cover"):
        cuda.correct(out, x, U, B, torch.ones(3, dtype=torch.bool, device=DEVICE))


def test_bounds_with_a_stride_and_past_the_end() -> None:
    x, *_, B = problem(12, 37, 70, 9, torch.float32)
    norm, alpha = reference.delta_norm(x, B), torch.tensor(1.1, device=DEVICE)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
    expected = cuda.sequence_gate(norm, alpha, None, bounds)
    strided = torch.stack([bounds, bounds + 7], dim=1)[:, 0]
    past = torch.tensor([0, 5, 90], dtype=torch.int32, device=DEVICE)  # nothing behind the last token is written
    for others in (strided, past):
        for one, other in zip(cuda.sequence_gate(norm, alpha, None, others), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [3, 100, 300])
def test_a_delta_of_another_dtype_than_the_models(tokens: int) -> None:
    x, weight, bias, U, B = problem(tokens, 37, 70, 9, torch.float32)
    narrow, tau = x.bfloat16(), between(reference.delta_norm(x, B))
    out, fire, _ = cuda.gated_linear(narrow, weight.bfloat16(), bias.bfloat16(), U, B, tau)
    plain = torch.nn.functional.linear(narrow, weight.bfloat16(), bias.bfloat16())
    expected = reference.gated_delta(plain, narrow, U, B, tau)
    assert out.dtype == torch.bfloat16
    assert torch.equal(fire, expected[1])
    torch.testing.assert_close(out, expected[0], rtol=1e-2, atol=1e-2)


def test_sequence_padded_and_packed(way: str) -> None:
    x, weight, bias, U, B = problem(33, 40, 70, 9, torch.float32)
    delta, alpha = (weight, bias, U, B), torch.tensor(1.1, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(3, 11, generator=generator) > 0.3).to(DEVICE)
    state = torch.tensor([[4.0, 1.0, 3.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0]], device=DEVICE)
    padded = x.view(3, 11, -1).clone()
    padded[~mask] = float("nan")  # padding may hold anything
    check(way, x.view(3, 11, -1), delta, alpha, gate="sequence", mask=mask)
    whole = cuda.gated_linear(x.view(3, 11, -1), *delta, alpha, None, "sequence", mask, None, state)
    kept = cuda.gated_linear(padded, *delta, alpha, None, "sequence", mask, None, state)
    assert torch.equal(kept[0][mask], whole[0][mask])
    assert not bool(kept[1][~mask].any())
    bounds = torch.tensor([0, 6, 6, 30], dtype=torch.int32, device=DEVICE)
    check(way, x, delta, alpha, gate="sequence", cu_seqlens=bounds, state=state)


@pytest.mark.parametrize("before", [False, True])
def test_sequence_decode(before: bool) -> None:
    x, weight, bias, U, B = problem(7, 40, 70, 9, torch.float32)
    norm = reference.delta_norm(x, B)
    state = torch.stack([torch.full_like(norm, 6.0), norm * 0.5, norm * 0.1], dim=-1) if before else None
    mask = torch.tensor([[True]] * 5 + [[False]] * 2, device=DEVICE)
    alpha = torch.tensor(1.5, device=DEVICE)
    check("decode", x[:, None], (weight, bias, U, B), alpha, gate="sequence", mask=mask, state=state)


def test_strided_weight_and_inputs(way: str) -> None:
    x, weight, bias, U, B = problem(9, 37, 70, 9, torch.float32)
    assert U is not None
    conv1d = weight.T.contiguous().T  # transformers' Conv1D stores [d, m]
    wide = torch.randn(9, 140, device=DEVICE)
    wide[:, ::2] = x
    check(way, wide[:, ::2], (conv1d, bias, U.T.contiguous().T, B), between(reference.delta_norm(x, B)))


def test_a_strided_sketch_and_bias(way: str) -> None:
    x, weight, bias, U, B = problem(6, 40, 130, 33, torch.bfloat16)
    sketch = make_sketch(B, 1e-9, rows=24)
    assert sketch is not None
    norm = reference.delta_norm(x, B)
    strided = torch.stack([bias, bias + 5], dim=1)[:, 0]
    for other in (sketch.T.contiguous().T, torch.cat([sketch, sketch + 1], dim=1)[:, :130]):
        check(way, x, (weight, strided, U, B), between(norm), other)


def test_not_a_number_stays_with_its_token(way: str) -> None:
    x, weight, bias, U, B = problem(9, 37, 70, 9, torch.float32)
    threshold = between(reference.delta_norm(x, B))
    clean = cuda.gated_linear(x, weight, bias, U, B, threshold)
    x = x.clone()
    x[4] = float("nan")
    dirty = cuda.gated_linear(x, weight, bias, U, B, threshold)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(dirty[0][others], clean[0][others])
    assert bool(dirty[0][4].isnan().all())


@pytest.mark.parametrize("dense", [False, True])
def test_parts(dense: bool) -> None:
    x, weight, bias, U, B = problem(21, 37, 70, 9, torch.float32, dense=dense)
    out = torch.nn.functional.linear(x, weight, bias)
    norm = reference.delta_norm(x, B)
    torch.testing.assert_close(cuda.delta_norm(x, B), norm)
    fire = norm >= between(norm)
    before = out.clone()
    torch.testing.assert_close(cuda.correct(out, x, U, B, fire), reference.correct(out, x, U, B, fire))
    assert torch.equal(out, before)
    # the gradient's use: transposed, strided factors
    factors = (None, B.T) if U is None else (B.T, U.T)
    back = torch.zeros_like(x)
    torch.testing.assert_close(cuda.correct(back, out, *factors, fire), reference.correct(back, out, *factors, fire))
    ours = cuda.gated_delta(out, x, U, B, between(norm))
    plain = reference.gated_delta(out, x, U, B, between(norm))
    torch.testing.assert_close(ours[0], plain[0])
    assert torch.equal(out, before)


def test_no_token_and_fp64_run_the_plain_definition() -> None:
    x, weight, bias, U, B = problem(4, 37, 70, 9, torch.float32)
    out, fire, _ = cuda.gated_linear(x[:0], weight, bias, U, B, torch.tensor(1.0, device=DEVICE))
    assert out.shape == (0, 37)
    assert fire.shape == (0,)
    wide = [part.double() for part in (x, weight, bias, U, B)]  # type: ignore[union-attr]
    assert cuda.gated_linear(*wide, torch.tensor(1.0, device=DEVICE))[0].dtype == torch.float64


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: products go in slices of d."""
    from coachhook_fast.kernels import delta_norm, gate, listed

    for module in (delta_norm, gate, listed):
        monkeypatch.setattr(module, "processors", lambda device: 24)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["calibrated", "relative"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_in_slices(
    dtype: torch.dtype, gate: str, dense: bool, large: bool, many_processors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        from coachhook_fast.kernels import delta_norm

        monkeypatch.setattr(delta_norm, "LARGE_FP32", 0)  # of fp32 cuBLAS makes one slice
    x, weight, bias, U, B = problem(70, 50, 600, 20, dtype, dense=dense)
    norm = reference.delta_norm(x, B)
    tau = between(norm / reference.key_length(x) if gate == "relative" else norm)
    out = torch.nn.functional.linear(x, weight, bias)
    expected = reference.gated_delta(out.double(), x.double(), U if U is None else U.double(), B.double(), tau, gate)
    plain = reference.gated_delta(out, x, U, B, tau, gate)
    for sketch in (None, make_sketch(B, 1e-9, rows=16)):
        first, second = (cuda.gated_delta(out, x, U, B, tau, sketch, gate) for _ in range(2))
        assert torch.equal(first[1], expected[1])
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[0][~first[1]], out[~first[1]])
        assert_as_good(first[0], plain[0], expected[0])


@pytest.mark.parametrize("dense", [False, True])
def test_a_small_product_needs_no_sketch(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, U, B = problem(70, 50, 600, 36, torch.float32, dense=dense)
    threshold = between(reference.delta_norm(x, B))
    wrong = torch.zeros(16, 600, device=DEVICE)  # nobody fires by it
    assert not cuda.gated_linear(x, weight, bias, U, B, threshold, wrong)[1].any()
    monkeypatch.setattr(cuda, "EXACT", 70 * B.numel())
    check("exact", x, (weight, bias, U, B), threshold, wrong)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("undecided", [0, 15, 30, 47, 60, 90, 200])
def test_any_number_of_undecided_tokens(undecided: int, dense: bool, many_processors: None) -> None:
    """The second stage takes 1 to 4 units of 16 fp32 tokens at once, then blocks of 4 units."""
    x, weight, bias, U, B = problem(200, 50, 600, 36, torch.float32, dense=dense)
    norm = reference.delta_norm(x, B)
    x = x / norm[:, None]
    x[torch.randperm(200, generator=torch.Generator().manual_seed(1))[:undecided]] *= 90  # past the sketch
    x[:, 0] += 0.01
    tau = torch.tensor(80.0, device=DEVICE)
    out = torch.nn.functional.linear(x, weight, bias)
    ours = cuda.gated_delta(out, x, U, B, tau, make_sketch(B, 1e-9, rows=24))
    expected = reference.gated_delta(out, x, U, B, tau)
    assert int(expected[1].sum()) == undecided
    assert torch.equal(ours[1], expected[1])
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cuda.correct(out, x, U, B, expected[1]), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    for tokens in (1, 40, 100, 600):
        x, weight, bias, U, B = problem(tokens, 256, 512, 32, torch.bfloat16)
        threshold = between(reference.delta_norm(x, B))
        expected = cuda.gated_linear(x, weight, bias, U, B, threshold)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cuda.gated_linear(x, weight, bias, U, B, threshold)[0]
        x.copy_(x.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected.flip(0)) or torch.allclose(out.float(), expected.flip(0).float(), rtol=1e-2)
