// What a transformer block computes beside its products and its attention, one operation each, forward and
// back: coachhook_fast/ops/reference/block_parts.py has the definitions. fp32 and fp64.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace coachhook {

// x [..., m], weight [m] -> weight * x / rms(x) and 1 / rms(x) [...].
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                             const at::Tensor& scale);

// silu(gate) * up, of one shape; gradients of both.
at::Tensor silu_product(const at::Tensor& gate, const at::Tensor& up);
std::tuple<at::Tensor, at::Tensor> silu_product_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                         const at::Tensor& up);

// x [B, H, S, D] turned by cos and sin [B or 1, S, D], which is linear in x; `back` is its transpose.
at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back);

}  // namespace coachhook
