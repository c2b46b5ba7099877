// Attention of packed rows behind a fixed prefix of each: coachhook_fast/ops/reference/packed_attention.py
// has the definition. Rows are a few tokens long and share nothing, so there is no padding to compute, no key
// is repeated for the heads that share it, and nothing of the prefix gets a gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace coachhook {

// q [S, H, D], k [S, Hk, D], v [S, Hk, Dv], prefixes [N, Hk, P, D] and [N, Hk, P, Dv], mask [N, 1 or H, Q,
// P + Q] bool, additive or none, cu_seqlens [N + 1] -> out [S, H, Dv] and the weights [S, H, P + max_seqlen].
std::tuple<at::Tensor, at::Tensor> packed_attention(const at::Tensor& q, const at::Tensor& k,
                                                    const at::Tensor& v, const at::Tensor& prefix_k,
                                                    const at::Tensor& prefix_v,
                                                    const std::optional<at::Tensor>& mask,
                                                    const at::Tensor& cu_seqlens, int64_t max_seqlen,
                                                    double scale);

// Gradients of q, k and v for the gradient [S, H, Dv] of out.
std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& prefix_k, const at::Tensor& prefix_v, const at::Tensor& weights,
    const at::Tensor& cu_seqlens, double scale);

}  // namespace coachhook
