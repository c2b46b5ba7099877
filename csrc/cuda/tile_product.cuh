// 16 rows of a matrix times up to 16 tokens, bf16 or fp16: what decode.cu's kernels stream W0 and B with.
#pragma once

#include "cuda/decode.h"
#include "cuda/matrix_unit.cuh"

namespace coachhook {
namespace {

constexpr int kWarps = 16;  // of a block, at most

// Shared memory of a block for NT times 8 tokens: products of each warp [warps, 8 * NT, 16 + 1], then their
// sums [8 * NT, 16].
constexpr int kStride = kTileRows + 1;

template <int NT>
__host__ __device__ constexpr int shared_floats(int warps) {
  return warps * 8 * NT * kStride + 8 * NT * kTileRows;
}

// sums[token][row] = w[row] . x[token] over columns begin .. end, for `rows` <= 16 rows of w and all tokens;
// the block's warps share out the columns.
template <typename T, int NT>
__device__ void tile_product(const T* w, int64_t w_row, int rows, const T* x, int64_t x_row, int tokens,
                             int begin, int end, float* parts, float* sums) {
  constexpr int kDeep = 4;  // loads in flight
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  const int group = lane / 4, quad = lane % 4;
  // rows and tokens that are not there repeat the last one: what they give is not looked at
  const T* upper = w + static_cast<int64_t>(min(group, rows - 1)) * w_row + 8 * quad;
  const T* lower = w + static_cast<int64_t>(min(group + 8, rows - 1)) * w_row + 8 * quad;
  const T* token[NT];
#pragma unroll
  for (int n = 0; n < NT; ++n)
    token[n] = x + static_cast<int64_t>(min(8 * n + group, tokens - 1)) * x_row + 8 * quad;

  const int first = begin + warp * kStep, stride = warps * kStep;
  const auto load = [&](const T* p, int k) {
    return k + 8 * quad < end ? load_once(p + k) : make_uint4(0, 0, 0, 0);
  };
  float acc[NT][4] = {};
  uint4 a[kDeep], b[kDeep];
#pragma unroll
  for (int i = 0; i < kDeep; ++i) {
    a[i] = load(upper, first + i * stride);
    b[i] = load(lower, first + i * stride);
  }
  for (int k = first; k < end; k += kDeep * stride) {
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
      const int at = k + i * stride;
      const bool inside = at + 8 * quad < end;
      uint4 v[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        v[n] = inside ? __ldg(reinterpret_cast<const uint4*>(token[n] + at)) : make_uint4(0, 0, 0, 0);
      }
      const uint4 up = a[i], low = b[i];
      a[i] = load(upper, at + kDeep * stride);
      b[i] = load(lower, at + kDeep * stride);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        multiply<T>(acc[n], up.x, low.x, up.y, low.y, v[n].x, v[n].y);
        multiply<T>(acc[n], up.z, low.z, up.w, low.w, v[n].z, v[n].w);
      }
    }
  }

#pragma unroll
  for (int n = 0; n < NT; ++n) {
    float* column = parts + (warp * 8 * NT + 8 * n + 2 * quad) * kStride + group;
    column[0] = acc[n][0];
    column[kStride] = acc[n][1];
    column[8] = acc[n][2];
    column[kStride + 8] = acc[n][3];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * kTileRows; i += blockDim.x) {
    const int t = i / kTileRows, row = i % kTileRows;
    float total = 0;
    for (int other = 0; other < warps; ++other) total += parts[(other * 8 * NT + t) * kStride + row];
    sums[i] = total;
  }
  __syncthreads();
}

}  // namespace
}  // namespace coachhook
