"""``torch.ops.coachhook.*``: importing this package defines every op and loads the extension if any."""

from __future__ import annotations

from coachhook_fast.ops import block_parts as block_parts
from coachhook_fast.ops import cholesky as cholesky
from coachhook_fast.ops import gated_linear as gated_linear
from coachhook_fast.ops import gated_linear_cuda as gated_linear_cuda
from coachhook_fast.ops import packed_attention as packed_attention
from coachhook_fast.ops._library import build_info, extension_available

__all__ = ["build_info", "extension_available"]
