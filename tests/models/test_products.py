"""Products with frozen weights by oneDNN: those of torch, with their gradients, wherever they apply."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.nn import functional as F

from coachhook_fast.models.passes import products
from coachhook_fast.models.passes.products import fast_linears, linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")


@pytest.fixture(autouse=True)
def far_from_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any maker's processor."""
    monkeypatch.setattr(products, "mkl_is_at_home", lambda: False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the products that oneDNN was given."""
    seen: list[torch.Size] = []
    inner = products._product

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.shape)
        return inner(x, weight, bias)

    monkeypatch.setattr(products, "_product", product)
    return seen


@needs_onednn
@pytest.mark.parametrize("shape", [(16, 33), (3, 37, 65), (1, 130, 1), (2, 5, 7, 48)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradient_of_a_product(
    shape: tuple[int, ...], transposed: bool, with_bias: bool, calls: list[torch.Size]
) -> None:
    m, d = 29, shape[-1]
    x = torch.randn(shape).transpose(0, -2).contiguous().transpose(0, -2).requires_grad_()  # any strides
    weight = torch.randn(d, m).T if transposed else torch.randn(m, d)
    bias = torch.randn(m) if with_bias else None
    grad = torch.randn(*shape[:-1], m)
    out = linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = F.linear(x, weight, bias)
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6
    (found,) = torch.autograd.grad(out, x, grad)
    exact_grad = grad.double() @ weight.double()
    assert (found - exact_grad).abs().max() <= 2 * (grad @ weight - exact_grad).abs().max() + 1e-6
    assert calls, "the product went another way"


@needs_onednn
@pytest.mark.parametrize(
    "case", ["fp64", "bf16", "few rows", "weight learns", "bias learns", "autocast", "no tokens", "strides"]
)
def test_everything_else_is_torch_own(case: str, calls: list[torch.Size]) -> None:
    x, weight, bias = torch.randn(40, 24), torch.randn(8, 24), torch.randn(8)
    if case in ("fp64", "bf16"):
        dtype = torch.float64 if case == "fp64" else torch.bfloat16
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    weight = torch.randn(8, 48)[:, ::2] if case == "strides" else weight
    x = x[:15] if case == "few rows" else x[:0] if case == "no tokens" else x
    weight.requires_grad_(case == "weight learns")
    bias.requires_grad_(case == "bias learns")
    with torch.autocast("cpu", enabled=case == "autocast"):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=0)
    assert not calls


@needs_onednn
def test_wrong_shapes_get_torch_own_error_and_onednn_can_be_switched_off(calls: list[torch.Size]) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        linear(torch.randn(20, 8), torch.randn(3, 9))
    with torch.backends.mkldnn.flags(enabled=False):
        linear(torch.randn(20, 8), torch.randn(3, 8))
    assert not calls


def test_intel_processors_keep_mkl(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "mkl_is_at_home", lambda: True)
    x, weight = torch.randn(40, 24), torch.randn(8, 24)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=0, atol=0)
    assert not calls


@needs_onednn
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_model_computes_the_same_and_is_left_as_it_was(family: str, calls: list[torch.Size]) -> None:
    model = tiny_model(family, dtype=torch.float32).requires_grad_(False)
    ids = torch.randint(3, 90, (4, 9))
    seen: list[nn.Module] = []
    probed = next(module for module in model.modules() if type(module) is nn.Linear)
    handle = probed.register_forward_hook(lambda module, *_: seen.append(module))
    expected = model(ids).logits
    with fast_linears(model):
        found = model(ids).logits
    handle.remove()
    assert calls
    assert len(seen) == 2, "hooks run as before"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


@needs_onednn
def test_layers_that_are_not_plain_are_called(calls: list[torch.Size]) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(20, 12), nn.Linear(12, 6)).requires_grad_(False)
    model[1].__dict__["forward"] = own = lambda x: x.sum(-1)  # as accelerate's offloading does
    x = torch.randn(30, 20)
    expected = model(x)
    with fast_linears(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert not calls
    assert model[1].__dict__["forward"] is own
