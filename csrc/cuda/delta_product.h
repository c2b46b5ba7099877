// The delta's product, overlapped with a base that leaves some multiprocessors of a Hopper GPU idle: what
// kernels/delta_norm.py computes, at more than its speed on each of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace coachhook {

// Slices of d, each of every `slices`-th block of 64 columns: c_i = x[:, i] P[:, i]^T, and l_i = ||x[:,
// i]||^2. x and P hold 16-bit numbers, bf16 or fp16; their rows begin on 16 bytes, and their columns are
// contiguous.
struct DeltaProduct {
  bool bf16;
  int tokens, r, d, slices;
  int block;  // tokens that share a tile of P: 128 or 256

  const void* x;  // [tokens, d]
  int64_t x_row;
  const void* p;  // [r, d]
  int64_t p_row;

  float* values;   // [slices, tokens, c_row]; columns from r on are zeros where x is finite
  int c_row;       // r, in whole steps of 16
  float* lengths;  // [slices, tokens] or null
  int* counts;     // [2]: set to zero
};

// Whether the current GPU runs it: compute capability 9.0, and no other, with a driver of CUDA 12.3 or later.
// To be asked, on each GPU, before the first launch: it loads the kernels.
bool has_delta_product();

// It begins a little later than it could, so that a base launched before it on another stream takes its place
// first.
cudaError_t launch_delta_product(const DeltaProduct& call, cudaStream_t stream);

}  // namespace coachhook
