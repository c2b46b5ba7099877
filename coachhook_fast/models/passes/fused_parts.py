"""A model's normalisations, rotary embeddings and SwiGLU products as one operation each, forward and back.

transformers computes each in up to a dozen of torch's, which on CPU cost as much as half of the products beside them. A
module is recognised by what it is called and by what it answers: it computes some random numbers, and only where ours
are the same to rounding does it compute by ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.models.passes.products import replaced_forward
from coachhook_fast.ops.block_parts import rms_norm, rotary, silu_product

_ROTARY = "apply_rotary_pos_emb"

# (module, what it computes instead)
Part = tuple[nn.Module, Callable[..., Any]]


@contextmanager
def computed_by(parts: Sequence[Part]) -> Iterator[None]:
    """Within it the modules of `parts` compute by them."""
    with ExitStack() as stack:
        for module, forward in parts:
            stack.enter_context(replaced_forward(module, forward))
        yield


@torch.no_grad()
def fused_parts(blocks: Sequence[nn.Module]) -> list[Part]:
    """What of `blocks`, frozen fp32 modules on CPU, can be computed by the operators."""
    return [
        (module, forward)
        for block in blocks
        for module in block.modules()
        if "forward" not in module.__dict__
        for fuse in (_norm, _ffn, _attention)
        if (forward := fuse(module)) is not None
    ]


def _norm(module: Any) -> Callable[..., Any] | None:
    weight: Any = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not _is_plain(weight, 1):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None

    def by(scale: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return rms_norm(x, scale, eps)[0]

        return forward

    x = _random(3, weight.numel())
    return next((by(w) for w in (weight.detach(), 1 + weight) if _alike(module.forward, by(w), x)), None)


def _ffn(module: Any) -> Callable[..., Any] | None:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    gate, up, down, act = parts
    if not all(isinstance(part, nn.Module) for part in parts) or not _is_plain(getattr(gate, "weight", None), 2):
        return None

    def forward(x: Tensor) -> Tensor:
        answer: Tensor = down(silu_product(gate(x), up(x)))
        return answer

    is_swiglu = _alike(act, nn.functional.silu, _random(33)) and _alike(
        module.forward, forward, _random(3, gate.weight.shape[1])
    )
    return forward if is_swiglu else None


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own code, with another function for its rotary embedding."""
    own = inspect.unwrap(type(module).forward)
    if not isinstance(own, FunctionType) or _ROTARY not in own.__code__.co_names or own.__closure__:
        return None
    plain = own.__globals__.get(_ROTARY)
    if not callable(plain):
        return None

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        if others or named or cos.dim() != 3 or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return plain(q, k, cos, sin, *others, **named)
        return rotary(q, cos, sin, False), rotary(k, cos, sin, False)

    tokens, angles = [_random(1, heads, 3, 4) for heads in (2, 1)], [_random(1, 3, 4), _random(1, 3, 4).flip(1)]
    if not _alike(plain, turned, *tokens, *angles):
        return None
    function = FunctionType(own.__code__, {**own.__globals__, _ROTARY: turned}, own.__name__, own.__defaults__)
    function.__kwdefaults__ = own.__kwdefaults__
    return function.__get__(module)  # type: ignore[no-any-return]


def _is_plain(weight: Any, dimensions: int) -> bool:
    """Whether a parameter is an fp32 one on CPU, of so many dimensions and of no class of its own."""
    return (
        type(weight) is nn.Parameter
        and weight.dim() == dimensions
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def _random(*shape: int) -> Tensor:
    """Numbers that leave torch's own generator as it is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _alike(theirs: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether both answer the same to rounding. What takes other arguments, or fails, is something else."""
    try:
        pairs = zip(_tensors(theirs(*inputs)), _tensors(ours(*inputs)), strict=True)
        return all(
            one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
            for one, other in pairs
        )
    except Exception:  # a module of anyone's: it may raise anything
        return False


def _tensors(answer: Any) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)
