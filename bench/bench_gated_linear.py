"""`pytest bench/bench_gated_linear.py`: `coachhook bench gated-linear` under pytest-benchmark, in smaller sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from coachhook_fast.bench import gated_linear, rows
from coachhook_fast.bench.gated_problem import SHAPES, SHARE, arrange, checked, keys, random_delta
from coachhook_fast.hooks.layer import HookLinear

SIZES = [(rank, tokens) for rank in (10, 100, "full") for tokens in (1, 64)]


def setting(rank: int | str, tokens: int) -> tuple[HookLinear, torch.Tensor]:
    torch.manual_seed(0)
    m, d = SHAPES["gpt2-xl"]
    hook = HookLinear(nn.Linear(d, m).requires_grad_(False))
    x = keys(tokens, d, torch.float32)
    arrange(hook, random_delta(m, d, rank, torch.float32), x, round(SHARE * tokens))
    return hook, x


@pytest.mark.parametrize(("rank", "tokens"), SIZES)
def test_gated_projection(benchmark: Any, rank: int | str, tokens: int) -> None:
    hook, x = setting(rank, tokens)
    assert checked(hook, x, round(SHARE * tokens))
    benchmark.group = f"gpt2-xl, rank {rank}, {tokens} tokens"
    with torch.inference_mode():
        benchmark(hook, x)


@pytest.mark.parametrize(("rank", "tokens"), SIZES)
def test_plain_projection(benchmark: Any, rank: int | str, tokens: int) -> None:
    hook, x = setting(rank, tokens)
    benchmark.group = f"gpt2-xl, rank {rank}, {tokens} tokens"
    with torch.inference_mode():
        benchmark(hook.base, x)


@pytest.mark.parametrize(("rank", "tokens"), SIZES)
def test_published_hook(benchmark: Any, rank: int | str, tokens: int) -> None:
    hook, x = setting(rank, tokens)
    twin = rows.baseline("published_hook").PublishedHook(hook.weight, hook.bias, hook.get_delta_weight(), 2.2)
    benchmark.group = f"gpt2-xl, rank {rank}, {tokens} tokens"
    with torch.inference_mode():
        benchmark(twin, x[None])


def test_rows() -> None:
    found = rows.complete(gated_linear.run(shapes=["gpt2-xl"], ranks=[10], tokens=[1], decisions=8000))
    assert all(row["checked"] for row in found)
