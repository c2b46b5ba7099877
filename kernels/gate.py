"""The decision and its consequence, without the host ever knowing how many tokens fire.

    c = sum_i c[i],  norm = ||c||   (the slices of delta_norm.py or listed.py, in their order)
    calibrated:  fire = norm >= tau         (a sketch's first stage: undecided = not norm < tau)
    relative:    fire = norm >= tau ||k||
    sequence:    sequence.py decides from the norms
    listed = the tokens that fire (or that a sketch leaves undecided), and how many
    out[listed] += c[listed] A^T            (dense Delta: c is the correction)

Every sum has a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .delta_norm import Parts, tile_product
from .launches import after_previous, launch, scratch
from .listed import slices_of
from .machine import cdiv, processors, width

TOGETHER = tl.constexpr(8)


@triton.jit
def add_slices(values, at, inside, step, pieces, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of the slices in their order, `TOGETHER` loads under way at once."""
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for first in range(0, pieces, TOGETHER):
        for piece in tl.static_range(TOGETHER):
            here = values + (first + piece) * step + at
            total += tl.load(here, mask=inside & (tl.full((1, 1), first + piece, tl.int32) < pieces), other=0.0)
    return total


@triton.jit
def decide_kernel(
    values,  # [slices, entries, c_row]; the first becomes c where KEEP
    lengths,  # [LENGTHS, tokens]; the first becomes their sum
    tau,  # []
    mask,  # [tokens] bool
    rows,  # [tokens] int32: token of each entry
    counts,  # [2] int32: tokens in the first list, and in the second
    norm,  # [tokens]
    fire,  # [tokens] bool
    places,  # [tokens] int32: entries of the list that is made
    listed,  # [tokens] int32: their tokens
    out,  # [tokens, m]
    tokens,
    m,
    c_row,
    split,  # slices; with LISTED, the most there are
    capacity,  # rows of values
    DECIDE: tl.constexpr,
    FIRST_STAGE: tl.constexpr,  # list what a sketch leaves undecided; nothing fires yet
    STORE_NORM: tl.constexpr,
    KEEP: tl.constexpr,  # c of the tokens that fire (without DECIDE: of all)
    ADD: tl.constexpr,  # c is the correction: add it instead of listing who fires
    HAS_MASK: tl.constexpr,
    LISTED: tl.constexpr,  # entries are the tokens of the first list
    LENGTHS: tl.constexpr,  # slices of ||k||^2; 0: tau is for every length
    LISTED_BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # a row of c is no longer than BLOCK_N
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    after_previous(EARLY)
    entries = tokens
    pieces = split
    if LISTED:
        entries = tl.load(counts)
        pieces = slices_of(entries, capacity, split, LISTED_BLOCK)
    step = (tl.zeros((), dtype=tl.int64) + entries) * c_row  # an argument that is 1 has no `.to`
    if tl.program_id(0) * BLOCK_T >= entries:
        return
    entry = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = entry < entries
    token = entry
    if LISTED:
        token = tl.load(rows + entry, mask=here, other=0)
    row = entry.to(tl.int64)[:, None] * c_row
    keep = here
    column = tl.arange(0, BLOCK_N)
    if ONE_BLOCK:
        inside = here[:, None] & (column < c_row)[None, :]
        total = add_slices(values, row + column[None, :], inside, step, pieces, BLOCK_T, BLOCK_N)
        value = tl.sqrt(tl.sum(total * total, axis=1))
    elif DECIDE or STORE_NORM:
        square = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for start in range(0, c_row, BLOCK_N):
            cols = start + column
            inside = here[:, None] & (cols < c_row)[None, :]
            some = add_slices(values, row + cols[None, :], inside, step, pieces, BLOCK_T, BLOCK_N)
            square += some * some
        value = tl.sqrt(tl.sum(square, axis=1))
    if STORE_NORM:
        tl.store(norm + entry, value, mask=here)
    if DECIDE:
        limit = tl.load(tau).to(tl.float32)
        if LENGTHS > 0:
            part = token[:, None] + tl.arange(0, LENGTHS)[None, :] * tokens
            length = tl.sum(tl.load(lengths + part, mask=here[:, None], other=0.0), axis=1)
            if FIRST_STAGE:
                tl.debug_barrier()
                tl.store(lengths + token, length, mask=here)
            limit = tl.maximum(limit * tl.sqrt(length), 1.1754943508222875e-38)  # a key of zeros does not fire
        if FIRST_STAGE:
            keep = here & ((value >= limit) | (value != value))  # a NaN goes on to the exact norm
        else:
            keep = here & (value >= limit)
        if HAS_MASK:
            keep = keep & (tl.load(mask + token, mask=here, other=0) != 0)
        if FIRST_STAGE:
            tl.store(fire + token, tl.zeros((BLOCK_T,), dtype=tl.int8), mask=here)
        else:
            tl.store(fire + token, keep.to(tl.int8), mask=here)
        if not ADD:
            # Lists are in the order in which programs come: who is listed where changes no token's bits.
            chosen = keep.to(tl.int32)
            number = tl.sum(chosen, axis=0)
            if number > 0:
                end = counts
                if LISTED:
                    end += 1
                position = tl.atomic_add(end, number, sem="relaxed") + tl.cumsum(chosen, axis=0) - 1
                tl.store(listed + position, token, mask=keep)
                if LISTED:
                    tl.store(places + position, entry, mask=keep)
    if KEEP or ADD:
        tl.debug_barrier()  # the first slice is overwritten: everyone has read it
        if tl.max(keep.to(tl.int32), axis=0) > 0:
            for start in range(0, c_row, BLOCK_N):
                cols = start + column
                inside = keep[:, None] & (cols < c_row)[None, :]
                if ONE_BLOCK:
                    some = total
                else:
                    some = add_slices(values, row + cols[None, :], inside, step, pieces, BLOCK_T, BLOCK_N)
                if ADD:
                    out_at = out + token.to(tl.int64)[:, None] * m + cols[None, :]
                    inside = keep[:, None] & (cols < m)[None, :]
                    some += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
                    tl.store(out_at, some.to(out.dtype.element_ty), mask=inside)
                else:
                    tl.store(values + row + cols[None, :], some, mask=inside)


@triton.jit
def list_kernel(
    fire,  # [tokens] bool
    listed,  # [tokens] int32 out: tokens that fire
    counts,  # [2] int32 out: how many, and zero
    tokens,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    before = tl.zeros((), dtype=tl.int32)
    for start in range(0, block * BLOCK, BLOCK):  # every program counts what came before: no chain, no atomics
        earlier = tl.load(fire + start + tl.arange(0, BLOCK))
        before += tl.sum((earlier != 0).to(tl.int32), axis=0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    here = (tl.load(fire + at, mask=at < tokens, other=0) != 0).to(tl.int32)
    tl.store(listed + before + tl.cumsum(here, axis=0) - here, at, mask=here != 0)
    if block == tl.num_programs(0) - 1:
        tl.store(counts, before + tl.sum(here, axis=0))
        tl.store(counts + 1, 0)


@triton.jit
def correct_kernel(
    out,  # [tokens, m]
    src,  # [*, n]: c, or the activations where Delta is dense
    a,  # [m, n]: U, or Delta
    places,  # [tokens] int32: rows of src, with MAPPED; else entry i is row i
    listed,  # [tokens] int32: rows of out
    count,  # [] int32
    m,
    n,
    src_row,
    a_row,
    a_col,
    MAPPED: tl.constexpr,
    CAST_X: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # a row of A is no longer than BLOCK_D
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < m
    if ONE_BLOCK:  # no kernel that is still under way writes A, and U is longest on its way
        inner = tl.arange(0, BLOCK_D)
        a_at = a + cols.to(tl.int64)[None, :] * a_row + inner.to(tl.int64)[:, None] * a_col
        tile = tl.load(a_at, mask=(inner < n)[:, None] & col_ok[None, :], other=0.0)
    after_previous(EARLY)
    limit = tl.load(count)
    for first in range(tl.program_id(0) * BLOCK_T, limit, tl.num_programs(0) * BLOCK_T):
        entry = first + tl.arange(0, BLOCK_T)
        row_ok = entry < limit
        row = entry
        if MAPPED:
            row = tl.load(places + entry, mask=row_ok, other=0)
        token = tl.load(listed + entry, mask=row_ok, other=0)
        at = out + token.to(tl.int64)[:, None] * m + cols[None, :]
        ok = row_ok[:, None] & col_ok[None, :]
        before = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        if ONE_BLOCK:
            some = tl.load(
                src + row.to(tl.int64)[:, None] * src_row + inner[None, :],
                mask=row_ok[:, None] & (inner < n)[None, :],
                other=0.0,
            )
            acc = tl.dot(some.to(tile.dtype), tile, before, input_precision="ieee")
        else:
            acc = before + tile_product(
                src, row, row_ok, src_row, a, cols, col_ok, a_row, a_col, 0, n, BLOCK_T, BLOCK_N, BLOCK_D, CAST_X
            )
        tl.store(at, acc.to(out.dtype.element_ty), mask=ok)


class FiredTokens(NamedTuple):
    """A list of tokens, and of the rows of c that are theirs."""

    places: Tensor  # [tokens] int32
    listed: Tensor  # [tokens] int32
    count: Tensor  # [] int32


def decide_blocks(c_row: int) -> dict[str, int]:
    """Tile sizes: a whole row where it is short, so that the slices' loads are all under way at once."""
    columns = min(width(c_row), 1024)
    return {"BLOCK_T": max(2, min(32, 2048 // columns)), "BLOCK_N": columns, "num_warps": 8 if columns > 128 else 4}


def decide(
    parts: Parts,
    tokens: int,
    tau: Tensor | None = None,  # []; None: no decision
    mask: Tensor | None = None,  # [tokens] bool
    *,
    fire: Tensor | None = None,  # [tokens] bool, written where measured
    lengths: Tensor | None = None,  # [slices, tokens]: tau is of ||k||; sums are left in the first slice
    norm: Tensor | None = None,  # [tokens], written
    first_stage: bool = False,
    keep: bool = False,
    out: Tensor | None = None,  # [tokens, m], changed in place: c, which is Delta k, is added where it fires
    early: bool = False,  # see launch
) -> FiredTokens:  # who fires (with `first_stage`: who is undecided), but with `out`
    """Norms, decision, and what follows from it, of every token or, after a sketch, of those listed in `parts`.

    keep: c is left in the first rows of ``parts.values``.
    """
    values, listing = parts.values, parts.rows is not None
    config = decide_blocks(values.shape[1])
    makes_list = tau is not None and out is None
    length = tokens if makes_list else 0
    listed = scratch(length, dtype=torch.int32, device=values.device)
    places = scratch(length, dtype=torch.int32, device=values.device) if listing else listed
    launch(
        decide_kernel,
        (cdiv(tokens, config["BLOCK_T"]),),
        values,
        values if lengths is None else lengths,
        values if tau is None else tau,
        values if mask is None else mask.view(torch.int8),
        values if parts.rows is None else parts.rows,
        parts.counts,
        values if norm is None else norm,
        values if fire is None else fire.view(torch.int8),
        places,
        listed,
        values if out is None else out,
        tokens,
        0 if out is None else out.shape[1],
        values.shape[1],
        parts.split,
        values.shape[0],
        DECIDE=tau is not None,
        FIRST_STAGE=first_stage,
        STORE_NORM=norm is not None,
        KEEP=keep and parts.split > 1,
        ADD=out is not None,
        HAS_MASK=mask is not None,
        LISTED=listing,
        LENGTHS=0 if lengths is None else lengths.shape[0],
        LISTED_BLOCK=parts.block,
        ONE_BLOCK=values.shape[1] <= config["BLOCK_N"],
        early=early,
        **config,
    )
    return FiredTokens(places, listed, parts.counts[1 if listing else 0])


def list_fired(fire: Tensor) -> tuple[Tensor, Tensor]:  # fire [tokens] bool -> listed [tokens], counts [2], int32
    """The tokens that fire, in order; entries from ``counts[0]`` on are not written."""
    tokens = fire.shape[0]
    listed = scratch(tokens, dtype=torch.int32, device=fire.device)
    counts = scratch(2, dtype=torch.int32, device=fire.device)
    launch(list_kernel, (cdiv(tokens, 1024),), fire.view(torch.int8), listed, counts, tokens, BLOCK=1024, num_warps=4)
    return listed, counts


def correct_blocks(dtype: torch.dtype, tokens: int, n: int) -> dict[str, int]:
    """Tile sizes; up to 128 columns of a 16-bit A are one block."""
    block_d = 32 if dtype == torch.float32 else width(n) if n <= 128 else 64
    return {"BLOCK_T": 32 if tokens > 1024 else 16, "BLOCK_N": 64, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1}


def correct(
    out: Tensor,  # [tokens, m] contiguous, changed in place
    src: Tensor,  # [*, >= n], columns contiguous
    a: Tensor,  # [m, n]
    places: Tensor | None,  # [tokens] int32; None: entry i is row i of src
    listed: Tensor,  # [tokens] int32
    count: Tensor,  # [] int32
    *,
    early: bool = False,  # see launch
) -> None:
    """``out[listed[i]] += a src[places[i]]`` for ``i < count``.

    The grid is what fills the machine, not what every token firing would need: few do.
    """
    tokens, m = out.shape
    size = correct_blocks(a.dtype, tokens, a.shape[1])
    tiles = cdiv(m, size["BLOCK_N"])
    blocks = min(cdiv(tokens, size["BLOCK_T"]), cdiv(4 * processors(out.device), tiles))
    launch(
        correct_kernel,
        (blocks, tiles),
        out,
        src,
        a,
        listed if places is None else places,
        listed,
        count,
        m,
        a.shape[1],
        src.stride(0),
        a.stride(0),
        a.stride(1),
        MAPPED=places is not None,
        CAST_X=src.dtype != a.dtype,
        ONE_BLOCK=a.shape[1] <= size["BLOCK_D"],
        early=early,
        **size,
    )
