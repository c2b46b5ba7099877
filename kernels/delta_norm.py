"""Base projection and the delta's squared norms in one pass over the activations.

    out = x W^T + b          [tokens, m]
    c   = x P^T              [tokens, r]   fp32, P is B, a sketch of it, or dense Delta
    sums[j, t] = sum of c[t, n]^2 over the columns n of tile j

W and P are two parts of one list of column tiles, so a tile of either reads the same activations. Every tile writes
its own partial sum and nothing is added atomically: the same input gives the same bits.

With `rows`, only the listed tokens are projected (as many as `count` says; the grid is sized for all of them, so the
host need not know).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_product(
    x,  # rows of activations, columns contiguous
    rows,  # [BLOCK_T] which rows
    row_ok,  # [BLOCK_T]
    x_row,
    w,  # [*, d] with any strides
    cols,  # [BLOCK_N] which rows of w
    col_ok,  # [BLOCK_N]
    w_row,
    w_col,
    begin,
    end,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAST_X: tl.constexpr,  # x comes in another dtype than w (the fp32 c of a 16-bit U)
):
    """fp32 ``[BLOCK_T, BLOCK_N]`` of ``x[rows, begin:end] w[cols, begin:end]^T``."""
    inner = tl.arange(0, BLOCK_D)
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    w_rows = w + cols.to(tl.int64)[None, :] * w_row
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_D):
        at = start + inner
        ok = at < end
        a = tl.load(x_rows + at[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
        b = tl.load(w_rows + at.to(tl.int64)[:, None] * w_col, mask=ok[:, None] & col_ok[None, :], other=0.0)
        if CAST_X:
            a = a.to(b.dtype)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def project_kernel(
    x,
    w,
    bias,
    p,
    out,
    c,
    sums,
    rows,  # [tokens] int32, with LISTED
    count,  # [] int32, with LISTED
    tokens,
    m,  # 0: no base part
    r,
    d,
    x_row,
    w_row,
    w_col,
    p_row,
    p_col,
    HAS_BIAS: tl.constexpr,
    STORE_C: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,  # token blocks that share a weight tile while it is in L2
):
    pid = tl.program_id(0)
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    delta_tiles = tl.cdiv(r, BLOCK_N)
    tiles = delta_tiles + tl.cdiv(m, BLOCK_N)
    first = pid // (GROUP * tiles) * GROUP
    group = min(token_blocks - first, GROUP)
    block = first + pid % (GROUP * tiles) % group
    tile = pid % (GROUP * tiles) // group

    limit = tokens
    if LISTED:
        limit = tl.load(count)
    if block * BLOCK_T >= limit:
        return
    place = block * BLOCK_T + tl.arange(0, BLOCK_T)
    row_ok = place < limit
    token = place
    if LISTED:
        token = tl.load(rows + place, mask=row_ok, other=0)

    if tile < delta_tiles:
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tile_product(
            x, token, row_ok, x_row, p, cols, cols < r, p_row, p_col, 0, d, BLOCK_T, BLOCK_N, BLOCK_D, False
        )
        tl.store(sums + tile.to(tl.int64) * tokens + place, tl.sum(acc * acc, axis=1), mask=row_ok)
        if STORE_C:
            c_at = c + place.to(tl.int64)[:, None] * r + cols[None, :]
            tl.store(c_at, acc, mask=row_ok[:, None] & (cols < r)[None, :])
    else:
        cols = (tile - delta_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tile_product(
            x, token, row_ok, x_row, w, cols, cols < m, w_row, w_col, 0, d, BLOCK_T, BLOCK_N, BLOCK_D, False
        )
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=cols < m, other=0.0).to(tl.float32)[None, :]
        out_at = out + place.to(tl.int64)[:, None] * m + cols[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & (cols < m)[None, :])


def blocks(dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Tile sizes, none of which spills on sm_80 (fp32 `ieee` products run on the CUDA cores)."""
    if dtype == torch.float32:
        size = 16 if tokens <= 16 else 32
        return {"BLOCK_T": size, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}
    if tokens <= 64:
        size = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        return {"BLOCK_T": size, "BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_T": 128, "BLOCK_N": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


def project(
    x: Tensor,  # [tokens, d], columns contiguous
    p: Tensor,  # [r, d]
    weight: Tensor | None = None,  # [m, d]: compute the base projection in the same launch
    bias: Tensor | None = None,  # [m]
    *,
    rows: Tensor | None = None,  # [tokens] int32: only these tokens ...
    count: Tensor | None = None,  # [] int32: ... and of them so many
    store_c: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """``(out [tokens, m] or None, c [tokens, r] fp32 or None, sums [tiles, tokens] fp32)``.

    With `rows`, entry i of ``c`` and ``sums`` belongs to token ``rows[i]``; entries from `count` on are not written.
    """
    tokens, d = x.shape
    r, m = p.shape[0], 0 if weight is None else weight.shape[0]
    config = blocks(x.dtype, tokens)
    tiles = triton.cdiv(r, config["BLOCK_N"])
    sums = torch.empty(tiles, tokens, dtype=torch.float32, device=x.device)
    c = torch.empty(tokens, r, dtype=torch.float32, device=x.device) if store_c else None
    out = None if weight is None else torch.empty(tokens, m, dtype=x.dtype, device=x.device)
    w = p if weight is None else weight
    grid = (triton.cdiv(tokens, config["BLOCK_T"]) * (tiles + triton.cdiv(m, config["BLOCK_N"])),)
    project_kernel[grid](
        x,
        w,
        x if bias is None else bias,
        p,
        x if out is None else out,
        sums if c is None else c,
        sums,
        sums if rows is None else rows,
        sums if count is None else count,
        tokens,
        m,
        r,
        d,
        x.stride(0),
        w.stride(0),
        w.stride(1),
        p.stride(0),
        p.stride(1),
        HAS_BIAS=bias is not None,
        STORE_C=store_c,
        LISTED=rows is not None,
        GROUP=8,
        **config,
    )
    return out, c, sums
