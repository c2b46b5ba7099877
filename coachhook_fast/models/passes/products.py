"""fp32 products with frozen weights on CPU, by oneDNN where MKL is not at home.

PyTorch gives fp32 products to MKL, which on other makers' processors than Intel's stays with AVX2: 230 where oneDNN
reaches 500 Gflop/s on two Zen 5 cores, at the same precision (docs/experiments/onednn.md). The editor's passes are such
products and little else. Nothing is copied or packed: oneDNN reads the module's own weight, transposed for the backward
pass.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.models.base_layer import base_of, linear_weight

# Below so many rows a product is bound by the bytes of the weight, which MKL reads as fast.
_ENOUGH_ROWS = 16


def linear(
    x: Tensor,  # [..., d]
    weight: Tensor,  # [m, d], any strides
    bias: Tensor | None = None,  # [m]
) -> Tensor:  # [..., m]
    """torch.nn.functional.linear, by oneDNN where that applies: fp32 on CPU, no gradient of weight or bias asked."""
    if not _applies(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() and x.requires_grad else _product(x, weight, bias)


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Within it the plain linear layers of `model` compute by `linear`, with whatever hooks they carry."""
    with ExitStack() as stack:
        for module in map(base_of, model.modules()):
            weight = linear_weight(module)
            if weight is not None and weight.dtype == torch.float32 and weight.device.type == "cpu":
                stack.enter_context(replaced_forward(module, _forward_of(module)))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it `module` computes `forward`, between the hooks it carries."""
    own = module.__dict__.get("forward")  # accelerate keeps its own `forward` on the instance: give that back
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _forward_of(module: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = linear_weight(module), module.bias
    assert weight is not None
    return lambda x: linear(x, weight, bias)


@functools.cache
def mkl_is_at_home() -> bool:
    """Whether torch has MKL and this is a processor of Intel's, on which its products are as fast as oneDNN's, and 1.3
    times as fast backward."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        about = platform.processor() if platform.system() != "Darwin" else "GenuineIntel"  # MKL is for x86 alone
    return "GenuineIntel" in about


def _applies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]  # where shapes do not fit, torch's own error says so
        and (weight.is_contiguous() or weight.T.is_contiguous())  # other strides take oneDNN a thousand times as long
        and x.numel() >= _ENOUGH_ROWS * x.shape[-1] > 0
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not mkl_is_at_home()
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen, and a view of the module's own: nothing to keep for a gradient
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _product(gradients[0], ctx.weight.T, None), None, None
