// The gated projection on CPU: see coachhook_fast/ops/reference/gated_linear.py for the definition of each
// operator.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace coachhook {

using OptionalTensor = std::optional<at::Tensor>;

// ||B k||_2 of every token: x [..., d], B [r, d] -> [...], fp32 (fp64 for fp64).
at::Tensor delta_norm(const at::Tensor& x, const at::Tensor& B);

// Decisions, z and running state of the `sequence` gate: norm [S, q], or [total] with cu_seqlens [S + 1].
std::tuple<at::Tensor, at::Tensor, at::Tensor> sequence_gate(const at::Tensor& norm, const at::Tensor& alpha,
                                                             const OptionalTensor& mask,
                                                             const OptionalTensor& cu_seqlens,
                                                             const OptionalTensor& state);

// out + U (B k) where fire: a new tensor. out [..., m], x [..., d], U [m, r] or none, B [r, d], fire [...].
at::Tensor correct(const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B,
                   const at::Tensor& fire);

// Gate and correction on a base's output: (new out [..., m], fire [...], state [S, 3]).
std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_delta(
    const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B,
    const at::Tensor& threshold, const OptionalTensor& sketch, std::string_view gate,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& state);

// The same with the base projection x W^T + b: weight [m, d], bias [m].
std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_linear(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& U,
    const at::Tensor& B, const at::Tensor& threshold, const OptionalTensor& sketch, std::string_view gate,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& state);

}  // namespace coachhook
