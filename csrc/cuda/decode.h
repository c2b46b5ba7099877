// The gated projection of few tokens on an NVIDIA GPU: what decode.cu computes, and its launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device.h"

namespace coachhook {

constexpr int kDecodeTokens = 16;  // the most that one call takes
constexpr int kTileRows = 16;      // rows of W0 or B a tile: the matrix instruction's

inline int tiles_of(int rows) { return (rows + kTileRows - 1) / kTileRows; }

// Pointers are to 16-bit numbers, bf16 or fp16, where the type says void; rows begin on 16 bytes and d is a
// multiple of 8. `threshold` is tau or alpha.
struct Decode {
  bool bf16;
  int tokens, m, r, s, d;

  const void* x;  // [tokens, d]
  int64_t x_row;
  const void* weight;  // [m, d], columns contiguous; null: `out` holds the base's output already
  int64_t w_row;
  const void* bias;  // [m] or null
  const void* U;     // [m, r] or null: B is Delta
  int64_t u_row, u_col;
  const void* B;       // [r, d] contiguous
  const void* sketch;  // [s, d] contiguous, or null

  const float* threshold;  // []
  bool relative, sequence;
  const bool* mask;     // [tokens] or null
  const float* before;  // [tokens, 3] or null: count, mean, M2 of each token's sequence

  void* out;     // [tokens, m]
  bool* fire;    // [tokens]
  float* after;  // [tokens, 3], under `sequence`

  float* workspace;  // decode_workspace() numbers
};

int64_t decode_workspace(const Decode& call);

// Squared norms and coordinates of the delta: ||B k||^2 by tiles, c = B k, and with `relative` ||k||.
// Before the base where `weight` is null, so that nothing waits for it.
cudaError_t launch_delta(const Decode& call, const Device& device);

// The base unless it is there, decisions, and corrections. Follows launch_delta in the same stream.
cudaError_t launch_finish(const Decode& call, const Device& device);

}  // namespace coachhook
