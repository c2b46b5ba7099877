// The CUDA key of gated_linear and gated_delta: few tokens go to decode.cu, all else to the Triton operators
// that coachhook_fast/ops/gated_linear_cuda.py registers under the names with "_triton".
#pragma once

#include "gated_linear.h"

namespace coachhook {

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_delta_cuda(
    const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B,
    const at::Tensor& threshold, const OptionalTensor& sketch, std::string_view gate,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& state);

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_linear_cuda(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& U,
    const at::Tensor& B, const at::Tensor& threshold, const OptionalTensor& sketch, std::string_view gate,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& state);

}  // namespace coachhook
