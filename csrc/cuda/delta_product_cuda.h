// ops.delta_product on CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace coachhook {

// coachhook_fast/ops/reference/delta_product.py says what it computes.
std::tuple<at::Tensor, at::Tensor, at::Tensor> delta_product_cuda(const at::Tensor& x, const at::Tensor& p,
                                                                  int64_t block, int64_t slices,
                                                                  bool want_length);

}  // namespace coachhook
