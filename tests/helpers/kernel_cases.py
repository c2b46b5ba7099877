"""What the tests of kernels share: a problem on the device at hand, a threshold, and how good an answer must be."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(
    tokens: int, m: int, d: int, r: int, dtype: torch.dtype, *, dense: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, bias, U, B with a few tokens whose norm stands out by a factor of four."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, bias = randn(tokens, d), randn(m, d) / d**0.5, randn(m)
    U, B = torch.linalg.qr(randn(m, r))[0].contiguous(), randn(r, d) / d**0.5
    if dense:
        B = U @ B
    x[::5] *= 4
    parts = [part.to(dtype=dtype, device=DEVICE) for part in (x, weight, bias, U, B)]
    return parts[0], parts[1], parts[2], None if dense else parts[3], parts[4]


def between(norm: Tensor) -> Tensor:
    """A threshold in the widest relative gap, so that rounding moves no decision."""
    values = norm.flatten().float().sort().values
    if values.numel() == 1:
        return values[0] * 0.9
    ratio = values[1:] / values[:-1]
    at = int(ratio.argmax())
    return (values[at] * values[at + 1]).sqrt()


def assert_as_good(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """No further from the exact answer than twice the same computation in plain torch (and its last bit)."""
    error = (ours.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= allowed, (float(error), float(allowed))
