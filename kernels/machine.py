"""What kernels' launchers must know of a GPU, and their arithmetic."""

from __future__ import annotations

import functools

import torch


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def capability(device: torch.device) -> int:
    """90 for sm_90; 0 where there is no GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv, which kernels can call too, takes the host ten times as long."""
    return -(-a // b)


def width(n: int) -> int:
    """A power of two that holds `n`, at least 16: the smallest side of a tensor core's tile."""
    return max(16, 1 << (n - 1).bit_length())
