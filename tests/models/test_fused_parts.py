"""What a block computes beside products and attention: operators against their definitions, modules against theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from coachhook_fast.models.passes.fused_parts import computed_by, fused_parts
from coachhook_fast.ops import extension_available
from coachhook_fast.ops.reference import block_parts as reference

ops = torch.ops.coachhook
SHAPES = [(3, 37), (2, 5, 64), (1, 1), (130, 129), (0, 8), (16,)]
ROTATED = [(1, 3, 5, 64), (2, 1, 7, 6), (3, 4, 1, 34), (1, 2, 0, 8)]
DTYPES = [torch.float32, torch.float64]


def close(ours: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(
        ours.double(), wanted, rtol=tolerance, atol=tolerance * (1 + float(wanted.abs().sum() > 0))
    )


def compared(op: Any, definition: Any, inputs: tuple[Tensor, ...], others: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Value and gradients of `op` against those of `definition` in fp64."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide = [other.to(dtype).double() if isinstance(other, Tensor) else other for other in others]
    narrow = [other.to(dtype) if isinstance(other, Tensor) else other for other in others]
    out, wanted = op(*leaves, *narrow), definition(*exact, *wide)
    out, wanted = (out[0], wanted[0]) if isinstance(out, tuple) else (out, wanted)
    close(out, wanted, dtype)
    grad = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(wanted, exact, grad.double())
    for one, other in zip(found, expected, strict=True):
        close(one, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(*shape[:-1], shape[-1] * 2)[..., ::2]  # any strides
    compared(ops.rms_norm, reference.rms_norm, (x,), (torch.rand(shape[-1]), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = 4 * torch.randn(shape), torch.randn(shape).flip(0)
    compared(ops.silu_product, reference.silu_product, (gate, up), (), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("shape", ROTATED)
def test_rotary(shape: tuple[int, ...], back: bool, dtype: torch.dtype) -> None:
    B, H, S, D = shape
    x = torch.randn(B, S, H, D).transpose(1, 2)
    for rows in (1, B):
        compared(ops.rotary, reference.rotary, (x,), (torch.randn(rows, S, D), torch.randn(rows, S, D), back), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ways_back_of_the_definitions(dtype: torch.dtype) -> None:
    """What other devices compute."""
    x, up, weight, grad = (torch.randn(shape, dtype=dtype) for shape in ((5, 9), (5, 9), (9,), (5, 9)))
    _, scale = ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(
        ops.rms_norm_backward(grad, x, weight, scale), reference.rms_norm_backward(grad, x, weight, scale)
    )
    for one, other in zip(
        ops.silu_product_backward(grad, x, up), reference.silu_product_backward(grad, x, up), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.0, -87.5, -80.0, 0.0, 80.0, 200.0, 1e30, torch.inf, torch.nan])
def test_silu_at_the_ends(value: float) -> None:
    gate, up = torch.full((5,), value), torch.ones(5)
    torch.testing.assert_close(
        ops.silu_product(gate, up), nn.functional.silu(gate), equal_nan=True, atol=1e-30, rtol=1e-5
    )


def test_opcheck() -> None:
    x, weight, up = torch.randn(3, 8, requires_grad=True), torch.randn(8), torch.randn(3, 8)
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(ops.rms_norm_backward.default, (up, x.detach(), weight, torch.rand(3)))
    torch.library.opcheck(ops.silu_product.default, (x, up.requires_grad_()))
    torch.library.opcheck(ops.silu_product_backward.default, (torch.randn(3, 8), x.detach(), up.detach()))
    heads = torch.randn(2, 3, 5, 8, requires_grad=True)
    torch.library.opcheck(ops.rotary.default, (heads, torch.randn(2, 5, 8), torch.randn(2, 5, 8), False))


@pytest.mark.skipif(not extension_available(), reason="the plain definition leaves shapes to torch")
def test_wrong_arguments_are_named() -> None:
    x, heads, odd = torch.randn(3, 8), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5)
    angles = torch.randn(1, 3, 4)
    for call, error, says in (
        (lambda: ops.rms_norm(x, torch.randn(7), 1e-5), ValueError, "weight must be"),
        (lambda: ops.rms_norm(x, torch.randn(8).double(), 1e-5), TypeError, "weight must be"),
        (lambda: ops.rms_norm(torch.randn(3, 0), torch.randn(0), 1e-5), ValueError, "m > 0"),
        (lambda: ops.silu_product(x, torch.randn(8)), ValueError, "up must be"),
        (lambda: ops.rms_norm(x.bfloat16(), torch.randn(8).bfloat16(), 1e-5), TypeError, "x must be fp32 or fp64"),
        (lambda: ops.silu_product(x.long(), x.long()), TypeError, "gate must be fp32 or fp64"),
        (lambda: ops.rotary(odd, angles, angles, False), ValueError, "even D"),
        (lambda: ops.rotary(heads, torch.randn(3, 4), angles, False), ValueError, "cos must be"),
        (lambda: ops.rotary(heads, angles, angles.double(), False), TypeError, "sin must be"),
    ):
        with pytest.raises(error, match=says):
            call()


# ------------------------------------------------------------------------------- in a model

# What is recognised in one block: norms (Gemma's and Qwen 3's have more), FFN, attention.
KNOWN = {"llama": 4, "mistral": 4, "qwen2": 4, "qwen3": 6, "gemma3": 7, "phi3": 3, "gpt2": 0, "gpt_neox": 1, "gptj": 0}


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_a_model_with_fused_parts_is_that_model(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32).requires_grad_(False)
    body = model.transformer.h if family.startswith("gpt") and family != "gpt_neox" else None
    blocks = list(body if body is not None else model.gpt_neox.layers if family == "gpt_neox" else model.model.layers)
    state = torch.get_rng_state()
    parts = fused_parts(blocks)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(parts) == KNOWN[family] * len(blocks)
    ids = torch.randint(3, 300, (2, 9))
    embedded = model.get_input_embeddings()(ids)

    def run() -> tuple[Tensor, Tensor]:
        leaf = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=leaf).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]

    wanted = run()
    with computed_by(parts):
        found = run()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    "what", ["another norm", "another activation", "bf16", "a forward of its own", "another product"]
)
def test_what_only_looks_alike_is_left_alone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16 if what == "bf16" else torch.float32)
    block = model.model.layers[0]
    norm, ffn = block.input_layernorm, block.mlp
    if what == "another norm":
        monkeypatch.setattr(type(norm), "forward", lambda self, x: x / x.abs().amax(-1, keepdim=True) * self.weight)
    if what == "another activation":
        ffn.act_fn = nn.GELU()
    if what == "another product":
        monkeypatch.setattr(
            type(ffn), "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
        )
    if what == "a forward of its own":
        norm.__dict__["forward"] = norm.forward
        ffn.__dict__["forward"] = ffn.forward
    found = {id(module) for module, _ in fused_parts([block])}
    assert (id(norm) in found) == (what in ("another activation", "another product"))
    assert (id(ffn) in found) == (what == "another norm")


class GatedRMSNorm(nn.Module):
    """Takes what a probe does not have, as Mamba's norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate


class RoutedFFN(nn.Module):
    """Answers with more than one tensor, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), x


@pytest.mark.parametrize("kind", [GatedRMSNorm, RoutedFFN])
def test_modules_that_cannot_be_asked_are_left_alone(kind: type[nn.Module]) -> None:
    assert fused_parts([nn.ModuleList([kind().requires_grad_(False)])]) == []
