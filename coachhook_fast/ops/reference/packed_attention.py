"""Attention of packed rows behind a fixed prefix of each, in plain torch.

Row n has the tokens cu_seqlens[n] … cu_seqlens[n + 1] − 1. Token i of it (from 0) looks at the P prefix columns of row
n and at the row's own tokens, as far as mask[n, ·, i] lets it; without a mask at the whole prefix and the tokens up to
itself:

    out = softmax(scale q Kᵀ + mask) V,   K = [prefix_k; k],   V = [prefix_v; v]

H heads of queries share Hk heads of keys and values (grouped-query attention: H a multiple of Hk). A token that may
look at nothing answers 0. The prefix is fixed: no gradient is computed for it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def packed_attention(
    q: Tensor,  # [S, H, D]
    k: Tensor,  # [S, Hk, D]
    v: Tensor,  # [S, Hk, Dv]
    prefix_k: Tensor,  # [N, Hk, P, D]
    prefix_v: Tensor,  # [N, Hk, P, Dv]
    mask: Tensor | None,  # [N or 1, 1 or H, Q, P + Q]: bool, True where a token may look; or added to the scores
    cu_seqlens: Tensor,  # [N + 1] int64
    max_seqlen: int,  # most tokens a row, at most Q
    scale: float,
) -> tuple[Tensor, Tensor]:  # out [S, H, Dv], weights [S, H, P + max_seqlen]
    """Output, and the softmax weights that the way back needs."""
    columns = prefix_k.shape[2] + max_seqlen
    outs, all_weights = [q.new_empty(0, q.shape[1], v.shape[2])], [q.new_empty(0, q.shape[1], columns)]
    for n, (start, end) in enumerate(_rows(cu_seqlens)):
        count = prefix_k.shape[2] + end - start
        K, V = _seen(prefix_k, k, n, start, end, q), _seen(prefix_v, v, n, start, end, q)
        scores = scale * torch.einsum("ihd,hjd->ihj", q[start:end], K)
        allowed = torch.ones(end - start, count, dtype=torch.bool, device=q.device).tril(prefix_k.shape[2])[:, None]
        if mask is not None:
            allowed = mask[n if len(mask) > 1 else 0, :, : end - start, :count].transpose(0, 1)
        if allowed.dtype == torch.bool:
            scores = scores.masked_fill(~allowed, -torch.inf)
        else:
            scores = scores + allowed
        at_nothing = scores.isneginf().all(-1, keepdim=True)
        weights = scores.masked_fill(at_nothing, 0).softmax(-1).masked_fill(at_nothing, 0)
        all_weights.append(torch.nn.functional.pad(weights, (0, columns - count)))
        outs.append(torch.einsum("ihj,hjd->ihd", weights, V))
    return torch.cat(outs), torch.cat(all_weights)


def packed_attention_backward(
    grad: Tensor,  # [S, H, Dv]: of out
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    weights: Tensor,  # [S, H, P + max_seqlen]
    cu_seqlens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of q, k and v
    """dV = Wᵀ dO,  dS = W ⊙ (dO Vᵀ − rowsum(W ⊙ dO Vᵀ)),  dq = scale dS K,  dk = scale dSᵀ q."""
    of_q, of_k, of_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    prefix, group = prefix_k.shape[2], q.shape[1] // k.shape[1]
    for n, (start, end) in enumerate(_rows(cu_seqlens)):
        K, V = _seen(prefix_k, k, n, start, end, q), _seen(prefix_v, v, n, start, end, q)
        W = weights[start:end, :, : prefix + end - start]
        of_weights = torch.einsum("ihd,hjd->ihj", grad[start:end], V)
        of_scores = scale * W * (of_weights - (W * of_weights).sum(-1, keepdim=True))
        of_q[start:end] = torch.einsum("ihj,hjd->ihd", of_scores, K)
        own = torch.einsum("ihj,ihd->jhd", of_scores[..., prefix:], q[start:end])
        of_k[start:end] = own.unflatten(1, (-1, group)).sum(2)
        own = torch.einsum("ihj,ihd->jhd", W[..., prefix:], grad[start:end])
        of_v[start:end] = own.unflatten(1, (-1, group)).sum(2)
    return of_q, of_k, of_v


def _rows(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.tolist()))


def _seen(prefix: Tensor, own: Tensor, n: int, start: int, end: int, q: Tensor) -> Tensor:
    """[H, P + tokens, width]: prefix and own rows, repeated for the heads of queries that share them."""
    both = torch.cat([prefix[n], own[start:end].transpose(0, 1)], dim=1)
    return both.repeat_interleave(q.shape[1] // own.shape[1], dim=0)
