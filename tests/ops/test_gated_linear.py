"""The operators: C++ against the plain definition, their contracts with torch, and the two-stage gate's decisions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coachhook_fast.ops import extension_available
from coachhook_fast.ops import gated_linear as ops
from coachhook_fast.ops.reference import gated_linear as reference
from coachhook_fast.ops.sketch import lower_quantile, make_sketch, sketch_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, *, m: int = 37, d: int = 70, r: int = 9, dense: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, bias, U, B with a few tokens whose norm stands out by a factor of four."""
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    x, weight, bias = randn(*shape, d), randn(m, d) / d**0.5, randn(m)
    U, B = torch.linalg.qr(randn(m, r))[0].contiguous(), randn(r, d) / d**0.5
    x.view(-1, d)[::5] *= 4
    B = U @ B if dense else B
    return x.to(dtype), weight.to(dtype), bias.to(dtype), None if dense else U.to(dtype), B.to(dtype)


def between(norm: Tensor) -> Tensor:
    """A threshold in the widest relative gap, so that rounding moves no decision."""
    values = norm.flatten().sort().values
    if values.numel() < 2:
        return values.sum() * 0.9
    at = int((values[1:] / values[:-1]).argmax())
    return (values[at] * values[at + 1]).sqrt()


def assert_as_good(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """No further from the exact answer than twice the same computation in plain torch (and its last bit)."""
    if ours.numel():
        error = (ours.double() - exact).abs().max()
        allowed = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(ours.dtype).eps * exact.abs().max()
        assert error <= allowed, (float(error), float(allowed))


def test_factors_that_decide_nothing_are_refused() -> None:
    x, weight, bias, U, B = problem((4,), torch.float32)
    with pytest.raises(RuntimeError, match="with rows"):  # under it every token would count as decided
        ops.gated_linear(x, weight, bias, U, B, torch.tensor(1.0), B[:0])
    with pytest.raises(RuntimeError, match="real numbers"):
        ops.delta_norm(x, B.to(torch.complex64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (40,), (0,), (3, 11), (2, 1, 5), (2, 300)])
@pytest.mark.parametrize("dense", [False, True])
def test_calibrated(dtype: torch.dtype, shape: tuple[int, ...], dense: bool) -> None:
    x, weight, bias, U, B = problem(shape, dtype, dense=dense)
    threshold = between(reference.delta_norm(x, B))
    ours = ops.gated_linear(x, weight, bias, U, B, threshold)
    plain = reference.gated_linear(x, weight, bias, U, B, threshold)
    wide = [None if part is None else part.double() for part in (x, weight, bias, U, B)]
    exact = reference.gated_linear(*wide, threshold)  # type: ignore[arg-type]
    assert ours[0].dtype == dtype
    assert ours[2].shape == (0, 3)
    assert torch.equal(ours[1], exact[1])
    assert_as_good(ours[0], plain[0], exact[0])
    base = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(ours[0][~ours[1]], base[~ours[1]])  # no gate, no change: not one bit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (0,), (2, 300)])
@pytest.mark.parametrize("sketched", [False, True])
def test_relative(dtype: torch.dtype, shape: tuple[int, ...], sketched: bool) -> None:
    """Decisions are those of ||Δk|| / ||k|| >= τ, and a long key alone does not fire."""
    x, weight, bias, U, B = problem(shape, dtype, r=33)
    x.view(-1, x.shape[-1])[1::3] *= 8
    ratio = reference.delta_norm(x.double(), B.double()) / x.double().norm(dim=-1)
    tau = between(ratio)
    threshold = tau.to(reference.accumulator_dtype(dtype))
    sketch = make_sketch(B, 1e-9, rows=24) if sketched else None
    out, fire, state = ops.gated_linear(x, weight, bias, U, B, threshold, sketch, "relative")
    assert torch.equal(fire, ratio >= tau)
    assert state.shape == (0, 3)
    plain = reference.gated_linear(x, weight, bias, U, B, threshold, "relative")
    torch.testing.assert_close(out, plain[0])
    base = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(ops.gated_delta(base, x, U, B, threshold, sketch, "relative")[1], fire)
    mask = torch.zeros(shape, dtype=torch.bool)
    assert not bool(ops.gated_linear(x, weight, bias, U, B, threshold, sketch, "relative", mask)[1].any())


def test_a_key_of_zeros_never_fires() -> None:
    x, weight, bias, U, B = problem((3,), torch.float32)
    x[1] = 0
    threshold = torch.tensor(1e-9)
    assert ops.gated_linear(x, weight, bias, U, B, threshold, None, "relative")[1].tolist() == [True, False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sketched", [False, True])
def test_a_relative_gate_leaves_tokens_without_numbers_alone(value: float, sketched: bool) -> None:
    x, weight, bias, U, B = problem((3,), torch.float32, r=33)
    x[1, 5] = value
    sketch = make_sketch(B, 1e-9, rows=24) if sketched else None
    for tau, fires in ((1e-9, True), (float("inf"), False)):
        out, fire, _ = ops.gated_linear(x, weight, bias, U, B, torch.tensor(tau), sketch, "relative")
        assert fire[::2].tolist() == [fires, fires]
        assert value == float("inf") or not bool(fire[1])  # as for every gate: NaN compares false, inf >= inf true
        assert bool(out[::2].isfinite().all())


def test_a_threshold_is_one_number() -> None:
    x, weight, bias, U, B = problem((4,), torch.float32)
    for gate in reference.RULES:
        with pytest.raises(ValueError, match="threshold must have no dimension"):
            ops.gated_linear(x, weight, bias, U, B, torch.ones(4), None, gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_state", [False, True])
def test_sequence(dtype: torch.dtype, with_state: bool) -> None:
    x, weight, bias, U, B = problem((3, 12), dtype)
    wide = reference.accumulator_dtype(dtype)
    alpha = torch.tensor(1.3, dtype=wide)
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) > 0.25
    state = torch.tensor([[4.0, 1.0, 3.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0]], dtype=wide) if with_state else None
    dirty = x.clone()
    dirty[~mask] = float("nan")
    ours = ops.gated_linear(dirty, weight, bias, U, B, alpha, None, "sequence", mask, None, state)
    plain = reference.gated_linear(x, weight, bias, U, B, alpha, "sequence", mask, None, state)
    assert torch.equal(ours[1], plain[1])
    assert not bool(ours[1][~mask].any())
    torch.testing.assert_close(ours[2], plain[2])
    # torch's own fp16 product takes a NaN from one token to others on some processors (seen on an Intel one with AMX)
    sound = mask & ~torch.nn.functional.linear(dirty, weight, bias).isnan().any(-1)
    torch.testing.assert_close(ours[0][sound], plain[0][sound], rtol=2e-2, atol=2e-2)


def test_sequence_packed_equals_one_by_one() -> None:
    x, weight, bias, U, B = problem((30,), torch.float32)
    alpha, bounds = torch.tensor(1.2), torch.tensor([0, 9, 9, 10, 26], dtype=torch.int32)
    out, fire, state = ops.gated_linear(x, weight, bias, U, B, alpha, None, "sequence", None, bounds)
    assert not bool(fire[26:].any())  # past the last boundary: padding
    assert state[:, 0].tolist() == [9.0, 0.0, 1.0, 16.0]
    for begin, end in ((0, 9), (10, 26)):
        alone = ops.gated_linear(x[None, begin:end], weight, bias, U, B, alpha, None, "sequence")
        assert torch.equal(alone[1][0], fire[begin:end])
        torch.testing.assert_close(alone[0][0], out[begin:end])


def test_running_state_carries_the_statistics_on() -> None:
    x, _, _, _, B = problem((2, 20), torch.float64)
    norm, alpha = reference.delta_norm(x, B), torch.tensor(1.0, dtype=torch.float64)
    _, whole_z, whole = ops.sequence_gate(norm, alpha)
    state = None
    for begin, end in ((0, 7), (7, 8), (8, 20)):
        _, z, state = ops.sequence_gate(norm[:, begin:end], alpha, None, None, state)
    torch.testing.assert_close(state, whole)
    torch.testing.assert_close(z[:, -1], whole_z[:, -1])
    torch.testing.assert_close(whole_z, (norm - norm.mean(-1, True)) / norm.std(-1, keepdim=True))


def test_fewer_than_two_tokens_never_fire() -> None:
    norm, alpha = torch.tensor([[5.0], [7.0]]), torch.tensor(-10.0)
    fire, z, state = ops.sequence_gate(norm, alpha)
    assert not bool(fire.any())
    assert bool(z.isnan().all())
    fire, z, _ = ops.sequence_gate(norm, alpha, None, None, state)
    assert not bool(fire.any())  # two equal norms have no deviation: still nothing to stand out from
    fire, _, _ = ops.sequence_gate(norm + 1.0, alpha, None, None, state)
    assert bool(fire.all())


def test_statistics_survive_a_large_offset() -> None:
    norm = (torch.rand(1, 4096, generator=torch.Generator().manual_seed(0)) + 1000.0).float()
    _, _, first = ops.sequence_gate(norm[:, :2048].contiguous(), torch.tensor(1.0))
    _, _, both = ops.sequence_gate(norm[:, 2048:].contiguous(), torch.tensor(1.0), None, None, first)
    std = (both[0, 2] / (both[0, 0] - 1)).sqrt()
    torch.testing.assert_close(std.double(), norm.double().std(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_comes_from_the_delta_itself(dtype: torch.dtype) -> None:
    x, _, _, _, B = problem((64,), dtype, d=700)
    exact = reference.delta_norm(x.double(), B.double())
    for tokens in (1, 16, 64):  # few-token and many-token products
        error = (ops.delta_norm(x[:tokens], B).double() - exact[:tokens]) / exact[:tokens]
        assert error.abs().max() < 1e-5


def test_fp16_products_with_special_values() -> None:
    x = torch.ones(1, 16, dtype=torch.float16)
    B = torch.zeros(6, 16, dtype=torch.float16)
    B[0, 0], B[1, 0], B[2, 0], B[3, 0], B[4, 0] = 6e-8, 65504.0, -1.5, float("inf"), float("nan")
    for row in range(6):
        ours = ops.delta_norm(x, B[row : row + 1])
        torch.testing.assert_close(ours, B[row, :1].abs().float(), equal_nan=True)


def test_nan_stays_with_its_token() -> None:
    x, weight, bias, U, B = problem((9,), torch.float32)
    threshold = between(reference.delta_norm(x, B))
    clean = ops.gated_linear(x, weight, bias, U, B, threshold)
    x[4] = float("nan")
    for sketch in (None, make_sketch(B, 1e-3, rows=4)):
        out, fire, _ = ops.gated_linear(x, weight, bias, U, B, threshold, sketch)
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        torch.testing.assert_close(out[others], clean[0][others])
        assert not bool(fire[4])


def test_strided_arguments() -> None:
    x, weight, bias, U, B = problem((3, 8), torch.float32)
    assert U is not None
    threshold = between(reference.delta_norm(x, B))
    expected = ops.gated_linear(x, weight, bias, U, B, threshold)[0]
    strided = [part.T.contiguous().T for part in (weight, U, B)]
    ours = ops.gated_linear(x.transpose(0, 1).contiguous().transpose(0, 1), strided[0], bias, *strided[1:], threshold)
    torch.testing.assert_close(ours[0], expected)


def test_gated_delta_leaves_the_base_output_alone() -> None:
    x, weight, bias, U, B = problem((11,), torch.float32)
    threshold = between(reference.delta_norm(x, B))
    base = torch.nn.functional.linear(x, weight, bias)
    kept = base.clone()
    out, _, _ = ops.gated_delta(base, x, U, B, threshold)
    assert torch.equal(base, kept)
    torch.testing.assert_close(out, ops.gated_linear(x, weight, bias, U, B, threshold)[0])
    half, _, _ = ops.gated_delta(base.bfloat16(), x, U, B, threshold)  # a base of another dtype
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_hold_the_decision_fixed(dense: bool) -> None:
    x, weight, bias, U, B = problem((6,), torch.float64, m=7, d=10, r=3, dense=dense)
    threshold = between(reference.delta_norm(x, B))
    leaves = [part.clone().requires_grad_() for part in (x, weight, bias)]

    def run(*parts: Tensor) -> Tensor:
        return ops.gated_linear(*parts, U, B, threshold)[0]

    assert torch.autograd.gradcheck(run, tuple(leaves))
    assert torch.autograd.gradgradcheck(lambda part: run(part, weight, bias), (leaves[0],))
    assert torch.autograd.gradcheck(
        lambda out, part: ops.gated_delta(out, part, U, B, threshold)[0],
        (
            torch.randn(6, 7, dtype=torch.float64, requires_grad=True),
            leaves[0],
        ),
    )


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_opcheck(gate: str) -> None:
    x, weight, bias, U, B = problem((2, 6), torch.float32)
    threshold = torch.tensor(1.0) if gate == "sequence" else between(reference.delta_norm(x, B))
    mask, state = (torch.rand(2, 6) > 0.2, torch.rand(2, 3)) if gate == "sequence" else (None, None)
    tail = (U, B, threshold, None, gate, mask, None, state)
    leaf = x.clone().requires_grad_()
    base = torch.nn.functional.linear(x, weight, bias)
    library = torch.ops.coachhook
    torch.library.opcheck(library.gated_linear.default, (leaf, weight, bias, *tail))
    torch.library.opcheck(library.gated_delta.default, (base, leaf, *tail))
    norm = reference.delta_norm(x, B)
    torch.library.opcheck(library.delta_norm.default, (x, B))
    torch.library.opcheck(library.sequence_gate.default, (norm, threshold, None, None, state))  # it rejects NaN
    torch.library.opcheck(library.correct.default, (base, leaf, U, B, norm > 1.0))


def test_autocast_moves_no_decision() -> None:
    x, weight, bias, U, B = problem((40,), torch.float32)
    threshold = between(reference.delta_norm(x, B))
    plain = ops.gated_linear(x, weight, bias, U, B, threshold)
    with torch.autocast("cpu", torch.bfloat16):
        out, fire, _ = ops.gated_linear(x, weight, bias, U, B, threshold)
    assert out.dtype == torch.bfloat16
    assert torch.equal(fire, plain[1])
    torch.testing.assert_close(out.float(), plain[0], rtol=3e-2, atol=5e-2)


@pytest.mark.skipif(not extension_available(), reason="the plain definition leaves shapes to torch")
def test_errors_name_the_argument() -> None:
    x, weight, bias, U, B = problem((4,), torch.float32)
    threshold = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 70\]"):
        ops.delta_norm(x[:, 1:], B)
    with pytest.raises(RuntimeError, match="U must be"):
        ops.gated_linear(x, weight, bias, B, B, threshold)
    with pytest.raises(ValueError, match="gate must be"):
        ops.gated_linear(x, weight, bias, U, B, threshold, None, "perhaps")
    plain = torch.nn.functional.linear(x, weight, bias)
    for wrong in (plain[:3], plain[:, 1:], plain[None]):
        with pytest.raises(RuntimeError, match="out must be"):
            ops.gated_delta(wrong, x, U, B, threshold)
        with pytest.raises(RuntimeError, match="out must be"):
            ops.correct(wrong, x, U, B, torch.ones(4, dtype=torch.bool))
    for sketch in (B[:, 1:], B.bfloat16()):
        with pytest.raises(RuntimeError, match="sketch"):
            ops.gated_linear(x, weight, bias, U, B, threshold, sketch)
    with pytest.raises(RuntimeError, match="mask must cover 4 tokens"):
        ops.gated_linear(x, weight, bias, U, B, threshold, None, "calibrated", torch.ones(5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="cu_seqlens must ascend"):
        ops.sequence_gate(torch.ones(4), threshold, None, torch.tensor([0, 3, 2]))
    with pytest.raises(RuntimeError, match="state must be"):
        ops.sequence_gate(torch.ones(1, 4), threshold, None, None, torch.zeros(2, 3))


# -------------------------------------------------------------------------------- two stages


def test_quantiles_are_those_of_chi_square() -> None:
    assert [round(lower_quantile(rows, 1e-9), 2) for rows in (64, 128, 256)] == [0.52, 0.65, 0.75]
    c = lower_quantile(64, 1e-2)
    samples = torch.randn(100_000, 64, generator=torch.Generator().manual_seed(0)).square().mean(-1).sqrt()
    assert math.isclose(float((samples < c).double().mean()), 1e-2, rel_tol=0.15)
    with pytest.raises(ValueError, match="probability must lie"):
        lower_quantile(64, 0.7)


def test_the_sketch_is_a_function_of_the_edit_set() -> None:
    *_, B = problem((1,), torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = make_sketch(B, 1e-9, rows=16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, make_sketch(B.clone(), 1e-9, rows=16))  # type: ignore[arg-type]
    assert not torch.equal(first, make_sketch(B + 1e-3, 1e-9, rows=16))  # type: ignore[arg-type]
    assert make_sketch(B, 1e-9) is None  # rank 9: all of B is cheaper
    assert [sketch_rows(rank) for rank in (10, 100, 1000, 4096, 16384)] == [0, 0, 64, 128, 256]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_stages_decide_as_one(dtype: torch.dtype, dense: bool) -> None:
    x, weight, bias, U, B = problem((2000,), dtype, m=160, d=200, r=120, dense=dense)
    threshold = between(reference.delta_norm(x, B))
    sketch = make_sketch(B, 1e-9, rows=64)
    assert sketch is not None
    one = ops.gated_linear(x, weight, bias, U, B, threshold)
    two = ops.gated_linear(x, weight, bias, U, B, threshold, sketch)
    assert torch.equal(one[1], two[1])
    torch.testing.assert_close(one[0], two[0])
    undecided = reference.delta_norm(x, sketch) >= threshold
    assert bool(undecided[one[1]].all())
    assert float(undecided.double().mean()) < 0.6
