"""Attention of packed rows: the operator against its definition, and a model's own code around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from installed import before
from tiny import FAMILIES, tiny_config, tiny_model
from torch import Tensor

from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.passes import packed_rows
from coachhook_fast.models.passes.forward import PartialModel, align_rows, frozen
from coachhook_fast.models.passes.packed_attention import Packing, attention_modules, packed_attention
from coachhook_fast.models.passes.packed_rows import PackedRows, packed_modules
from coachhook_fast.models.passes.padded_rows import PaddedRows
from coachhook_fast.models.passes.step_rows import step_rows
from coachhook_fast.ops import extension_available
from coachhook_fast.ops.reference import packed_attention as reference

op = torch.ops.coachhook.packed_attention
op_backward = torch.ops.coachhook.packed_attention_backward

#         N, H, Hk, D, Dv, P, Q
SHAPES = [
    (5, 6, 2, 7, 9, 3, 4),
    (3, 4, 4, 64, 64, 0, 5),
    (1, 3, 1, 1, 1, 1, 1),
    (9, 9, 3, 33, 80, 21, 2),
    (2, 2, 1, 130, 5, 70, 9),
]
MASKS = ["none", "bool", "added", "of every head", "one for all"]


def problem(shape: tuple[int, ...], dtype: torch.dtype, mask: str = "none", seed: int = 0) -> list[Any]:
    N, H, Hk, D, Dv, P, Q = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator)

    lengths = torch.randint(0, Q + 1, (N,), generator=generator)
    lengths[N // 2] = Q
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    S = int(cu_seqlens[-1])
    made: Tensor | None = None
    if mask != "none":
        rows, heads = (1 if mask == "one for all" else N), (H if mask == "of every head" else 1)
        made = torch.rand(rows, heads, Q, P + Q, generator=generator) > 0.4
        made[0, :, 0] = False  # looks at nothing
        if mask == "added":
            made = random(rows, heads, Q, P + Q).masked_fill(~made, -torch.inf)
    q = random(S, D, H).transpose(1, 2) if H > 1 and seed % 2 else random(S, H, D)  # any strides
    prefix = random(N, Hk, P, D), random(N, Hk, P, Dv)
    return [q, random(S, Hk, D), random(S, Hk, Dv), *prefix, made, cu_seqlens, Q, D**-0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradients_are_those_of_the_definition(
    shape: tuple[int, ...], mask: str, dtype: torch.dtype, seed: int
) -> None:
    parts = problem(shape, dtype, mask, seed)
    exact = [part.double() if isinstance(part, Tensor) and part.is_floating_point() else part for part in parts]
    for inputs in (parts, exact):
        for tensor in inputs[:3]:
            tensor.requires_grad_()
    (out, weights), (wanted, wanted_weights) = op(*parts), reference.packed_attention(*exact)
    grad = torch.randn(wanted.shape, dtype=torch.float64)
    found = torch.autograd.grad(out, parts[:3], grad.to(dtype))
    expected = torch.autograd.grad(wanted, exact[:3], grad)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for ours, theirs in zip((out, weights, *found), (wanted, wanted_weights, *expected), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    with torch.no_grad():  # what other devices compute
        theirs = reference.packed_attention_backward(grad, *exact[:5], wanted_weights, exact[6], exact[8])
    for one, other in zip(theirs, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_every_gradient_of_it_is_a_gradient() -> None:
    parts = problem(SHAPES[0], torch.float64, "bool", 1)
    leaves = [part.requires_grad_() for part in parts[:3]]
    assert torch.autograd.gradcheck(lambda *these: op(*these, *parts[3:])[0], leaves)


def test_opcheck() -> None:
    parts = problem(SHAPES[0], torch.float32, "bool")
    leaves = [part.clone().requires_grad_() for part in parts[:3]]
    torch.library.opcheck(op.default, (*leaves, *parts[3:]))
    out, weights = op(*parts)
    torch.library.opcheck(op_backward.default, (torch.randn_like(out), *parts[:5], weights, parts[6], parts[8]))


def test_the_same_bits_for_any_number_of_threads() -> None:
    parts = problem((40, 9, 3, 64, 64, 17, 6), torch.float32, "bool")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, weights = op(*parts)
            found.append((out, *op_backward(out, *parts[:5], weights, parts[6], parts[8])))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nan_and_infinity_are_not_hidden() -> None:
    parts = problem((2, 2, 1, 8, 8, 2, 3), torch.float32)
    parts[0][0, 1, 3] = torch.nan
    out, _ = op(*parts)
    assert out[0, 1].isnan().all()
    assert not out[0, 0].isnan().any()
    parts = problem((2, 2, 1, 8, 8, 2, 3), torch.float32)
    parts[2][0, 0, 3] = torch.inf  # the first token's value, at which it looks itself
    assert op(*parts)[0][0, :, 3].isinf().all()


@pytest.mark.parametrize(
    "shape", [(2, 4, 2, 8, 8, 3, 0), (0, 4, 2, 8, 8, 3, 1), (2, 4, 2, 0, 8, 0, 1), (2, 4, 2, 8, 0, 3, 2)]
)
def test_nothing_at_all(shape: tuple[int, ...]) -> None:
    """No tokens, no rows, or no width."""
    N, H, Hk, D, Dv, P, Q = shape
    lengths = torch.full((N,), Q)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    S = N * Q
    parts = [torch.randn(S, H, D), torch.randn(S, Hk, D), torch.randn(S, Hk, Dv)]
    leaves = [part.requires_grad_() for part in parts]
    out, _ = op(*leaves, torch.randn(N, Hk, P, D), torch.randn(N, Hk, P, Dv), None, cu_seqlens, Q, 1.0)
    assert out.shape == (S, H, Dv)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert torch.isfinite(grad).all()


@pytest.mark.skipif(not extension_available(), reason="the plain definition leaves shapes to torch")
@pytest.mark.parametrize(
    ("place", "wrong", "error", "says"),
    [
        (0, torch.randn(3, 5, 7), ValueError, "q, k and v must be"),
        (1, torch.randn(3, 2, 8), ValueError, "q, k and v must be"),
        (2, torch.randn(4, 2, 9), ValueError, "q, k and v must be"),
        (3, torch.randn(2, 2, 3, 8), ValueError, "prefix_k and prefix_v must be"),
        (4, torch.randn(1, 2, 3, 9), ValueError, "prefix_k and prefix_v must be"),
        (0, torch.randn(3, 6, 7).bfloat16(), TypeError, "q must be fp32 or fp64"),
        (3, torch.randn(2, 2, 3, 7).double(), TypeError, "one dtype"),
        (5, torch.ones(2, 1, 2, 4, dtype=torch.bool), ValueError, "mask must be"),
        (5, torch.ones(2, 1, 2, 5, dtype=torch.int64), TypeError, "mask must be bool"),
        (6, torch.tensor([0, 1, 4]), ValueError, "cu_seqlens must rise from 0 to the 3 tokens"),
        (6, torch.tensor([1, 2, 3]), ValueError, "cu_seqlens must rise"),
        (6, torch.tensor([0, 3, 3]), ValueError, "at most max_seqlen = 2"),
        (6, torch.tensor([0, 1, 3], dtype=torch.int32), ValueError, "cu_seqlens must be"),
    ],
)
def test_wrong_arguments_are_named(place: int, wrong: Tensor, error: type[Exception], says: str) -> None:
    q, k, v = torch.randn(3, 6, 7), torch.randn(3, 2, 7), torch.randn(3, 2, 9)
    parts: list[Any] = [
        q,
        k,
        v,
        torch.randn(2, 2, 3, 7),
        torch.randn(2, 2, 3, 9),
        None,
        torch.tensor([0, 1, 3]),
        2,
        1.0,
    ]
    op(*parts)
    parts[place] = wrong
    with pytest.raises(error, match=says):
        op(*parts)


# ------------------------------------------------------------------------------- a model around it

needs_extension = pytest.mark.skipif(not extension_available(), reason="without it rows are padded")

ROWS = [[5, 9, 30, 41, 7, 8], [11, 12, 13], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71], [99], [5, 9, 30, 2]]
LOOKUPS = [2, 0, 9, 0, 2]
PACKED = [family for family in FAMILIES if family != "gemma2"]  # its soft cap is no scaled dot product attention


def both(model: Any, last: int = 1) -> tuple[PaddedRows, Any]:
    partial = PartialModel(model, layout_of(model))
    tokens = align_rows(ROWS, LOOKUPS, 0, torch.device("cpu"))
    with torch.no_grad(), frozen(model):
        return PaddedRows.of(partial, last, tokens, False), step_rows(partial, last, tokens, whole_rows=False)


def both_logits(padded: PaddedRows, packed: Any, rows: list[int], columns: list[int]) -> tuple[Tensor, Tensor]:
    shifts, places = torch.randn(len(ROWS), padded.hidden.shape[-1]), (torch.tensor(rows), torch.tensor(columns))
    with torch.no_grad(), frozen(padded.partial.model):
        return padded.logits(shifts, *places), packed.logits(shifts, *places)


@needs_extension
@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("last", [0, 2])
def test_packed_rows_are_padded_rows(family: str, last: int) -> None:
    if family == "gptj" and before("transformers", "5.24"):
        pytest.skip("GPT-J before 5.24 attends by itself, not by transformers' interface")
    model = tiny_model(family, dtype=torch.float32)
    config = {id(module): module.config for module in model.modules() if hasattr(module, "config")}
    padded, packed = both(model, last)
    assert isinstance(packed, PackedRows)
    places = torch.tensor([0, 0, 2, 3, 4, 1, 0]), torch.tensor([0, 3, 2, 0, 1, 2, 3])
    kept = torch.tensor([0, 2, 3])
    few = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 2, 0, 1])
    for one, other, at in ((padded, packed, places), (padded.select(kept), packed.select(kept), few)):
        count = len(ROWS) if at is places else len(kept)
        shifts = torch.randn(count, padded.hidden.shape[-1]).requires_grad_()
        with frozen(model):
            wanted, found = one.logits(shifts, *at), other.logits(shifts, *at)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(wanted)
        expected = torch.autograd.grad(wanted, shifts, grad)[0]
        torch.testing.assert_close(torch.autograd.grad(found, shifts, grad)[0], expected, rtol=2e-4, atol=2e-4)
    for module in model.modules():
        if hasattr(module, "config"):
            assert module.config is config[id(module)]


@needs_extension
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_in_bf16(autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        padded, packed = both(tiny_model("llama", dtype=torch.float32 if autocast else torch.bfloat16))
        assert isinstance(packed, PackedRows)
        wanted, found = both_logits(padded, packed, [0, 2, 4], [1, 2, 0])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


WHY_NOT = ["eager attention", "soft cap", "whole rows", "last block", "a forward of its own", "looks ahead", "no C++"]


@pytest.mark.parametrize("why", WHY_NOT)
def test_what_is_not_packed(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "soft cap" and before("transformers", "5.21"):
        pytest.skip("Gemma 2 before 5.21 attends without its soft cap where scaled dot product attention is asked for")
    model = tiny_model("gemma2" if why == "soft cap" else "llama", dtype=torch.float32)
    if why == "eager attention":
        model.set_attn_implementation("eager")
    if why == "no C++":  # the definition's loop over rows would be slower than padding
        monkeypatch.setattr(packed_rows, "extension_available", lambda: False)
    if why == "looks ahead":
        model.model.layers[2].self_attn.is_causal = False
    if why == "a forward of its own":
        kind = type(model.model.layers[2].self_attn)
        monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: None)
    partial = PartialModel(model, layout_of(model))
    last = len(partial.blocks) - 1 if why == "last block" else 1
    assert packed_modules(partial, last, why == "whole rows") is None


def test_attention_that_goes_past_the_interface_is_an_error() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    modules = attention_modules(list(model.model.layers))
    assert modules is not None
    packing = Packing(torch.tensor([0, 1]), 1, (), ())
    with (
        pytest.raises(RuntimeError, match=f"{len(modules)} of {len(modules)} attention"),
        packed_attention(modules, packing),
    ):
        pass
    assert all(module.config is model.config for module in modules)


@needs_extension
def test_sliding_windows_reach_packed_rows() -> None:
    """A window shorter than the rows, so that the mask is not just causal."""
    config = tiny_config("mistral", sliding_window=3)
    torch.manual_seed(0)
    model = type(tiny_model("mistral", dtype=torch.float32))(config).float().eval()
    padded, packed = both(model)
    assert isinstance(packed, PackedRows)
    wanted, found = both_logits(padded, packed, [0, 2, 4], [3, 2, 1])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
