"""The delta's product of listed tokens, whose number only the device knows.

    c[i, e] = x[rows[e], slice i] P[:, slice i]^T,   e < counts[0]

Few tokens are undecided after a sketch (about 7 % of them), so this is bound by the bytes of P, and every program
streams its own part of P: a tile of rows x a slice of d, for all listed tokens at once. How many tokens a program
multiplies that part with (one to four units) and into how many slices d goes is decided on the device by the count:
the fewer tokens, the more slices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .delta_norm import Parts, slices
from .launches import launch, scratch
from .machine import capability, cdiv, processors


@triton.jit
def slices_of(count, capacity, split, BLOCK: tl.constexpr):
    """Slices for `count` tokens: none where blocks of tokens are enough work, and no more than `capacity` rows hold."""
    some = tl.maximum(count, 1)
    return tl.maximum(1, tl.minimum(split // tl.cdiv(some, BLOCK), capacity // some))


@triton.jit
def sweep(
    x, p, rows, c, count, cols, col_ok, r, d, x_row, p_row, p_col, c_row, part, pieces,
    SPLIT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This program's share of (slices x blocks of HIGH + LOW tokens); the two parts of a block share P's tile."""
    inner = tl.arange(0, BLOCK_D)
    p_rows = p + cols.to(tl.int64)[None, :] * p_row
    keep = (cols < c_row)[None, :]
    size = tl.cdiv(tl.cdiv(d, BLOCK_D), pieces) * BLOCK_D
    for item in range(part, pieces * tl.cdiv(count, HIGH + LOW), SPLIT):
        piece = item % pieces
        begin = piece * size
        end = min(begin + size, d)
        entry = item // pieces * (HIGH + LOW) + tl.arange(0, HIGH)
        ok = entry < count
        x_rows = x + tl.load(rows + entry, mask=ok, other=0).to(tl.int64)[:, None] * x_row
        acc = tl.zeros((HIGH, BLOCK_N), dtype=tl.float32)
        if LOW > 0:
            low_entry = item // pieces * (HIGH + LOW) + HIGH + tl.arange(0, LOW)
            low_ok = low_entry < count
            low_rows = x + tl.load(rows + low_entry, mask=low_ok, other=0).to(tl.int64)[:, None] * x_row
            low = tl.zeros((LOW, BLOCK_N), dtype=tl.float32)
        for start in range(begin, end, BLOCK_D):
            at = start + inner
            inside = at < end
            b = tl.load(p_rows + at.to(tl.int64)[:, None] * p_col, mask=inside[:, None] & col_ok[None, :], other=0.0)
            a = tl.load(x_rows + at[None, :], mask=ok[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if LOW > 0:
                a_low = tl.load(low_rows + at[None, :], mask=low_ok[:, None] & inside[None, :], other=0.0)
                low = tl.dot(a_low, b, low, input_precision="ieee")
        c_rows = c + (piece * count).to(tl.int64) * c_row + cols[None, :]
        tl.store(c_rows + entry.to(tl.int64)[:, None] * c_row, acc, mask=ok[:, None] & keep)
        if LOW > 0:
            tl.store(c_rows + low_entry.to(tl.int64)[:, None] * c_row, low, mask=low_ok[:, None] & keep)


@triton.jit
def listed_kernel(
    x,  # [tokens, d]
    p,  # [r, d]
    rows,  # [tokens] int32
    counts,  # [2] int32: the first is how many are listed
    c,  # [capacity, c_row]: [slices, counts[0], c_row]
    capacity,
    r,
    d,
    x_row,
    p_row,
    p_col,
    c_row,
    SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    count = tl.load(counts)
    part = tl.program_id(0) % SPLIT
    cols = tl.program_id(0) // SPLIT * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < r
    pieces = slices_of(count, capacity, SPLIT, 4 * UNIT)
    if count <= UNIT:
        sweep(
            x, p, rows, c, count, cols, col_ok, r, d, x_row, p_row, p_col, c_row, part, pieces,
            SPLIT, UNIT, 0, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif count <= 2 * UNIT:
        sweep(
            x, p, rows, c, count, cols, col_ok, r, d, x_row, p_row, p_col, c_row, part, pieces,
            SPLIT, 2 * UNIT, 0, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif count <= 3 * UNIT:
        sweep(
            x, p, rows, c, count, cols, col_ok, r, d, x_row, p_row, p_col, c_row, part, pieces,
            SPLIT, 2 * UNIT, UNIT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        sweep(
            x, p, rows, c, count, cols, col_ok, r, d, x_row, p_row, p_col, c_row, part, pieces,
            SPLIT, 2 * UNIT, 2 * UNIT, BLOCK_N, BLOCK_D,
        )  # fmt: skip


def blocks(dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Tile sizes: as many tokens at once as registers hold. wgmma (sm_90 on) reads its operands from shared memory."""
    if dtype == torch.float32:
        return {"UNIT": 16, "BLOCK_N": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 3}
    unit, stages = (64, 4) if capability >= 90 else (32, 3)
    return {"UNIT": unit, "BLOCK_N": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": stages}


def project_listed(
    x: Tensor,  # [tokens, d], columns contiguous
    p: Tensor,  # [r, d]
    rows: Tensor,  # [tokens] int32
    counts: Tensor,  # [2] int32: so many of `rows`, and zero
) -> Parts:
    """``P k`` of the listed tokens; entry e belongs to token ``rows[e]``. At most half the activations' bytes more."""
    (tokens, d), r = x.shape, p.shape[0]
    config = blocks(x.dtype, capability(x.device))
    tiles = cdiv(r, config["BLOCK_N"])
    split = slices(tiles, d, config["BLOCK_D"], processors(x.device))
    c_row = cdiv(r, 16) * 16
    capacity = max(tokens, 3 * config["UNIT"] * split)
    values = scratch(capacity, c_row, dtype=torch.float32, device=x.device)
    launch(
        listed_kernel,
        (tiles * split,),
        x,
        p,
        rows,
        counts,
        values,
        capacity,
        r,
        d,
        x.stride(0),
        p.stride(0),
        p.stride(1),
        c_row,
        SPLIT=split,
        **config,
    )
    return Parts(values, split, counts, None, rows, 4 * config["UNIT"])
