"""How well the factor holds over many batches and on hard matrices: the targets of docs/solver.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook_fast.editing.key_memory import KeyMemory


def covariance(d: int, condition: float, seed: int = 0) -> Tensor:
    """[d, d] of exactly this condition number, eigenvalues spread evenly on a log scale."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d, dtype=torch.float64)
    C = (Q * eigenvalues) @ Q.T
    return (C + C.T) / 2


def edit(memory: KeyMemory, C: Tensor, batches: list[Tensor], m: int = 64) -> tuple[float, float]:
    """Δ = Σ R Xᵀ over the batches by the memory and by plain solves: relative errors of Δ and of C."""
    generator = torch.Generator().manual_seed(1)
    mine = plain = torch.zeros(m, C.shape[0], dtype=torch.float64)
    C = C.clone()
    for K in batches:
        R = torch.randn(m, K.shape[1], generator=generator, dtype=torch.float64)
        X, _ = memory.solve_update(K)
        C += K @ K.T
        mine = mine + R @ X.T
        plain = plain + R @ torch.linalg.solve(C, K).T
    return error(mine, plain), error(memory.matrix(), C)


def error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.slow
def test_a_thousand_batches(path: str) -> None:
    d, n, batches = 1536, 10, 1000 if path == "kernels" else 100
    generator = torch.Generator().manual_seed(0)
    C = covariance(d, 1e3) * 400
    K = torch.randn(batches, d, n, generator=generator, dtype=torch.float64)
    memory = KeyMemory.from_second_moment(C, 1.0)
    for batch in K:
        memory.update(batch)
    everything = K.transpose(0, 1).reshape(d, batches * n)
    C.addmm_(everything, everything.T)
    assert error(memory.matrix(), C) < 1e-12


@pytest.mark.slow
def test_a_thousand_batches_there_and_back(path: str) -> None:
    d, n, batches = 256, 10, 500
    generator = torch.Generator().manual_seed(0)
    C = covariance(d, 1e3) * 400
    K = torch.randn(batches, d, n, generator=generator, dtype=torch.float64) * 0.1
    memory = KeyMemory.from_second_moment(C, 1.0)
    for batch in K:
        memory.update(batch)
    for batch in K.flip(0):
        memory.downdate(batch)
    assert error(memory.matrix(), C) < 1e-11


@pytest.mark.parametrize(("condition", "bound"), [(1e3, 1e-9), (1e8, 1e-6)])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_delta_equals_the_plain_solves(path: str, condition: float, bound: float, scale: float) -> None:
    C = covariance(512, condition)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(512, 10, generator=generator, dtype=torch.float64) * scale for _ in range(10)]
    memory = KeyMemory.from_second_moment(C, 1.0)
    of_delta, of_C = edit(memory, C, batches)
    assert of_delta < bound
    assert of_C < 1e-13


def smollm2_keys(model: Any, tokenizer: Any, text: str, tokens: int, layers: range) -> dict[int, Tensor]:
    """The down-projections' inputs [tokens, d] of a text in rows of 512 tokens; the forward ends after the last."""
    ids = torch.tensor(tokenizer(text)["input_ids"][:tokens]).view(-1, 512)
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    class Enough(Exception):
        pass

    def keep(layer: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            kept[layer].append(args[0].detach().flatten(0, -2).double())
            if layer == layers[-1]:
                raise Enough

        return hook

    handles = [model.model.layers[i].mlp.down_proj.register_forward_pre_hook(keep(i)) for i in layers]
    try:
        with torch.no_grad():
            for rows in ids.split(4):
                try:
                    model(rows)
                except Enough:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


@pytest.mark.slow
def test_delta_on_smollm2s_statistics(smollm2: tuple[Any, Any], shared_data: Path) -> None:
    text = (shared_data / "wikitext2-test.raw").read_text()[:40_000]
    keys = smollm2_keys(*smollm2, text, 4096, range(4, 9))
    for layer, rows in keys.items():
        statistics, edited = rows[:-30], rows[-30:]
        C = 400.0 * (statistics.T @ statistics) / statistics.shape[0]
        memory = KeyMemory.from_second_moment(C, 1.0)
        of_delta, of_C = edit(memory, C, [K.T for K in edited.split(10)], m=576)
        assert of_delta < 1e-9, f"layer {layer}"
        assert of_C < 1e-13, f"layer {layer}"
