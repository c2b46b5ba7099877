// Inverses of the sweep's small triangles, without a synchronisation: one launch of
// csrc/cuda/small_cholesky.cu where it was built and they are small enough, ATen's routines otherwise.
#pragma once

#include <ATen/core/Tensor.h>

namespace coachhook {

// F^-1 for each M = F F^T of [count, size, size], fp64. `good`, a bool [] on the device, becomes
// false where an M is not positive definite.
at::Tensor inverse_factors(const at::Tensor& matrices, at::Tensor& good);

// The inverses of lower triangles [count, size, size], computed in fp64.
at::Tensor invert_lower(const at::Tensor& triangles);

}  // namespace coachhook
