// Inverse Cholesky factors of a few small matrices on an NVIDIA GPU, in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace coachhook {

constexpr int kSmallMatrix = 128;  // the largest size

// `count` matrices [size, size], row-major, fp64; of each the lower triangle is read. `inverses` get F^-1,
// zero above the diagonal, for M = F F^T; with `factored` the matrices are the F themselves. `good` gets, for
// each matrix, whether all its pivots were positive and finite. The outputs may not be the input.
cudaError_t launch_small_inverse(const double* matrices, double* inverses, bool* good, int count, int size,
                                 bool factored, cudaStream_t stream);

}  // namespace coachhook
