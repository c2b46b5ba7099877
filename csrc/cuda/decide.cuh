// Norms, decisions and corrections of decode.cu's kernels, from what the delta's kernel has left in the
// workspace.
#pragma once

#include <cfloat>

#include "cuda/tile_product.cuh"

namespace coachhook {
namespace {

// Norms of one token, by one warp, from its tiles' sums of squares.
__device__ float norm_of(const float* squares, int tiles, int lane) {
  float total = 0;
  for (int tile = lane; tile < tiles; tile += kLanes) total += __ldcg(squares + tile);
  return sqrtf(warp_sum(total));
}

struct Workspace {
  float* c;        // [tokens, r]
  float* squares;  // [tokens, tiles of B]
  float* rough;    // [tokens, tiles of the sketch]
  float* lengths;  // [tokens]
};

__host__ __device__ inline Workspace parts_of(const Decode& a) {
  Workspace w;
  w.c = a.workspace;
  w.squares = w.c + static_cast<int64_t>(a.tokens) * a.r;
  w.rough = w.squares + a.tokens * ((a.r + kTileRows - 1) / kTileRows);
  w.lengths = w.rough + a.tokens * ((a.s + kTileRows - 1) / kTileRows);
  return w;
}

__device__ float limit_of(const Decode& a, const Workspace& w, int token) {
  const float threshold = *a.threshold;
  return a.relative ? fmaxf(threshold * __ldcg(w.lengths + token), FLT_MIN) : threshold;
}

// Whether the sketch leaves the token open: NaN does.
__device__ bool is_open(const Decode& a, const Workspace& w, int token, int lane) {
  const int tiles = (a.s + kTileRows - 1) / kTileRows;
  const float rough = norm_of(w.rough + token * tiles, tiles, lane);
  return !(rough < limit_of(a, w, token));
}

// One token's decision, by one warp; the first block writes it down, and the state after it.
__device__ bool decide(const Decode& a, const Workspace& w, int token, int lane) {
  bool valid = a.mask == nullptr || a.mask[token];
  const int tiles = (a.r + kTileRows - 1) / kTileRows;
  bool fire = false;
  if (a.sequence) {
    const float norm = norm_of(w.squares + token * tiles, tiles, lane);
    float count = 0, mean = 0, m2 = 0;
    if (a.before != nullptr) {
      count = a.before[3 * token];
      mean = a.before[3 * token + 1];
      m2 = a.before[3 * token + 2];
    }
    if (valid) {
      const float shift = norm - mean;
      m2 += shift * shift * count / (count + 1);
      mean += shift / (count + 1);
      count += 1;
      fire = count >= 2 && (norm - mean) / sqrtf(m2 / (count - 1)) >= *a.threshold;
    }
    if (blockIdx.x == 0 && lane == 0) {
      a.after[3 * token] = count;
      a.after[3 * token + 1] = mean;
      a.after[3 * token + 2] = m2;
    }
  } else if (valid && (a.sketch == nullptr || is_open(a, w, token, lane))) {
    fire = norm_of(w.squares + token * tiles, tiles, lane) >= limit_of(a, w, token);
  }
  if (blockIdx.x == 0 && lane == 0) a.fire[token] = fire;
  return fire;
}

// Adds U c of the listed tokens to values[token][row], rows `first` .. first + here; a warp a row and token.
template <typename T>
__device__ void correct(const Decode& a, const Workspace& w, const int* listed, int count, int first,
                        int here, float* values, int value_stride) {
  if (a.U == nullptr) {
    for (int i = threadIdx.x; i < count * here; i += blockDim.x) {
      const int token = listed[i / here], row = i % here;
      values[token * value_stride + row] += __ldcg(w.c + static_cast<int64_t>(token) * a.r + first + row);
    }
    return;
  }
  constexpr int kDeep = 4;  // loads in flight
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  // the tokens of a row follow each other: U comes from the cache
  for (int i = warp; i < here * count; i += warps) {
    const int row = i / count, token = listed[i % count];
    const T* u = static_cast<const T*>(a.U) + (first + row) * a.u_row;
    const float* c = w.c + static_cast<int64_t>(token) * a.r;
    float total = 0;
    for (int start = lane; start < a.r; start += kDeep * kLanes) {
      float factor[kDeep], coordinate[kDeep];
#pragma unroll
      for (int j = 0; j < kDeep; ++j) {
        const int at = start + j * kLanes;
        factor[j] = at < a.r ? number(u[at * a.u_col]) : 0;
        coordinate[j] = at < a.r ? __ldcg(c + at) : 0;
      }
#pragma unroll
      for (int j = 0; j < kDeep; ++j) total += factor[j] * coordinate[j];
    }
    total = warp_sum(total);
    if (lane == 0) values[token * value_stride + row] += total;
  }
}

// The tokens that fire, in order; returns how many. All threads of the block get the same answer.
__device__ int list_fired(const Decode& a, const Workspace& w, int* listed) {
  __shared__ bool fired[kDecodeTokens];
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  for (int token = warp; token < a.tokens; token += warps) {
    const bool fire = decide(a, w, token, lane);
    if (lane == 0) fired[token] = fire;
  }
  __syncthreads();
  int count = 0;
  for (int start = 0; start < a.tokens; start += kLanes) {  // every warp lists; they write the same
    const int token = start + lane;
    const bool fire = token < a.tokens && fired[token];
    const unsigned votes = __ballot_sync(~0u, fire);
    if (fire) listed[count + __popc(votes & ((1u << lane) - 1))] = token;
    count += __popc(votes);
  }
  __syncthreads();
  return count;
}

}  // namespace
}  // namespace coachhook
