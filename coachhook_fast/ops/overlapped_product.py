"""The delta's product on the multiprocessors that an overlapped base leaves idle (csrc/cuda/delta_product.cu).

The tiles of a large base rarely fill their last round: of 132 multiprocessors a few have nothing to do for as long as
a tile takes, and the product of up to 128 rows is so little work that it fits there. Only in a CUDA graph, where the
host's time does not count, only on compute capability 9.0, and only where it was measured to pay:
docs/gated-linear.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from coachhook_fast.ops._library import EXTENSION, build_info, define
from coachhook_fast.ops.reference import delta_product as reference

if TYPE_CHECKING:
    from coachhook_fast.kernels.delta_norm import Parts


def _fake(x: Tensor, p: Tensor, block: int, slices: int, want_length: bool) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_empty(slices * x.shape[0], (p.shape[0] + 15) // 16 * 16, dtype=torch.float32)
    lengths = x.new_empty(slices if want_length else 0, x.shape[0], dtype=torch.float32)
    return values, lengths, x.new_empty(2, dtype=torch.int32)


define(
    "delta_product(Tensor x, Tensor p, int block, int slices, bool want_length) -> (Tensor, Tensor, Tensor)",
    reference.delta_product,
    _fake,
)

# The most rows of B, or of its sketch.
_ROWS = 128
# Elements of a weight from which on it pays: for tokens beyond those of which the base is bound by its bytes, but few,
# and for many. Between them the product takes as long as the base, or longer.
_LARGE, _FEW, _SOME, _MANY = 1 << 25, 64, 256, 2048
# With a smaller weight: a base long enough that is one round of tiles of 256 x 128, with an eighth of the machine idle.
_LONG, _ONE_ROUND = 1 << 34, 112 << 15
_COLUMNS = 24 * 64  # of d a block at least, which takes as long as a block's begin and end five times over


class Cut(NamedTuple):
    """How the product is cut into blocks."""

    block: int  # tokens
    slices: int  # of d


def cut(tokens: int, m: int, d: int, rows: int, *, lengths: bool, sketched: bool) -> Cut | None:
    """The blocks of a product with ``rows`` rows beside a base ``[m, d]``; None where another way is faster.

    lengths: the keys' lengths are asked for. sketched: the rows are a sketch's.
    """
    if m * d >= _LARGE:
        some = not sketched and _FEW < tokens <= (_SOME // 2 if lengths else _SOME)
        pays = some or tokens >= _MANY
    else:
        pays = tokens * m * d >= _LONG and tokens * m <= _ONE_ROUND
    if not pays or rows > _ROWS:
        return None
    # 256 tokens share a tile of P in fewer reads, but lengths then take longer than the product, and so do 128 rows
    block = 256 if tokens > 128 and rows <= 112 and not lengths else 128
    most = 4 if block == 256 and tokens >= _MANY else 8  # the fewer, the less work; the more, the sooner all are done
    slices = 1
    while 2 * slices <= most and d // (2 * slices) >= _COLUMNS:
        slices *= 2
    return Cut(block, slices)


def _has_rows(t: Tensor) -> bool:
    """Whether the copy engine can bring its rows."""
    row = t.stride(0)
    return t.stride(1) == 1 and row % 8 == 0 and row >= t.shape[1] and t.shape[1] % 8 == 0 and t.data_ptr() % 16 == 0


def cut_of(x: Tensor, p: Tensor, m: int, *, lengths: bool, sketched: bool) -> Cut | None:
    """`cut`, for ``x`` ``[tokens, d]`` and ``p`` ``[r, d]``; None where the kernel does not take them, too."""
    if not x.is_cuda or not build_info().get("cuda"):
        return None
    found = cut(x.shape[0], m, x.shape[1], p.shape[0], lengths=lengths, sketched=sketched)
    if found is None or x.dtype != p.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if not (_has_rows(x) and _has_rows(p)):
        return None
    # Asked before a graph is recorded, too, so that the code is loaded by then.
    is_there: bool = EXTENSION.has_delta_product()  # type: ignore[union-attr]
    return found if is_there and torch.cuda.is_current_stream_capturing() else None


def project(x: Tensor, p: Tensor, cut: Cut, *, want_length: bool = False) -> Parts:
    """`kernels.delta_norm.project` by that kernel, for a base that another stream has begun.

    x: [tokens, d], p: [r, d], both bf16 or both fp16, rows on 16 bytes.
    """
    from coachhook_fast.kernels.delta_norm import Parts

    values, lengths, counts = torch.ops.coachhook.delta_product(x, p, *cut, want_length)
    return Parts(values, cut.slices, counts, lengths if want_length else None)
