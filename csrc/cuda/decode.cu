// The gated projection of up to 16 tokens, bf16 or fp16:
//
//   c = B k,  M = ||c||,  P = W0 k + b,  fire = M >= tau (or tau ||k||, or z >= alpha),  out = P + fire * U c
//
// Decoding is bound by the bytes of W0 and B, so both are streamed once, 16 bytes a thread, into the tensor
// cores: 16 rows of the matrix by 8 tokens an instruction. The sum over d does not care for its order, so a
// thread keeps the 8 neighbours it has loaded and feeds them to two instructions; x is loaded by the same
// pattern.
//
// Two launches (three with a sketch): the delta's product, then the base with decision and correction. The
// second one starts beside the first (programmatic dependent launch, sm_90 on) and waits for it only after
// its own product, so that the delta costs its bytes and no latency. The delta has few rows: a cluster of
// blocks (sm_90 on) shares out d, and adds through its shared memory. Sums are added in a fixed order: the
// same input gives the same bits.
#include <cooperative_groups.h>

#include <algorithm>

#include "cuda/decide.cuh"
#include "cuda/decode.h"
#include "cuda/launch.cuh"
#include "cuda/tile_product.cuh"

namespace coachhook {
namespace {

constexpr int kColumns = 2048;  // of d, a block of a cluster

enum class Stage { kOnly, kSketch, kExact };

// sums[i] of this block becomes that of the whole cluster, in the order of its blocks; true in the block that
// has it.
__device__ bool add_over_cluster(float* sums, int count) {
#if __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  cg::cluster_group cluster = cg::this_cluster();
  const unsigned blocks = cluster.num_blocks();
  if (blocks == 1) return true;
  cluster.sync();
  const bool first = cluster.block_rank() == 0;
  if (first) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      float total = sums[i];
      for (unsigned other = 1; other < blocks; ++other) total += cluster.map_shared_rank(sums, other)[i];
      sums[i] = total;
    }
  }
  cluster.sync();  // the others' memory stays until it is read
  return first;
#else
  return true;
#endif
}

// Tiles of B (or of the sketch), `slices` blocks a tile, and after them, where `relative` asks for it, ||k||
// of a token a cluster.
template <typename T, int NT, Stage stage>
__global__ void __launch_bounds__(kWarps* kLanes, 1)
    delta_kernel(const Decode a, int tile_blocks, int slices) {
  extern __shared__ float shared[];
  // The base, which may start from here on, reads x before it waits: by then whatever wrote x must have
  // ended.
  if (stage != Stage::kExact) wait_for_previous();
  let_next_start();
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  const Workspace w = parts_of(a);
  const T* x = static_cast<const T*>(a.x);
  float* sums = shared + warps * 8 * NT * kStride;
  if (static_cast<int>(blockIdx.x) >= tile_blocks) {
    const int token = (blockIdx.x - tile_blocks) / slices;
    if (blockIdx.x % slices != 0) return;
    const T* row = x + token * a.x_row;
    float total = 0;
    for (int k = 8 * threadIdx.x; k < a.d; k += 8 * blockDim.x) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(row + k));
      const T* eight = reinterpret_cast<const T*>(&v);
#pragma unroll
      for (int i = 0; i < 8; ++i) total += number(eight[i]) * number(eight[i]);
    }
    total = warp_sum(total);
    if (lane == 0) shared[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int other = 1; other < warps; ++other) total += shared[other];
      w.lengths[token] = sqrtf(total);
    }
    return;
  }
  if constexpr (stage == Stage::kExact) {
    wait_for_previous();
    int open = 0;
    for (int token = warp; token < a.tokens; token += warps) open |= is_open(a, w, token, lane);
    if (__syncthreads_or(open) == 0) return;  // nobody asks: B is not read
  }
  constexpr bool rough = stage == Stage::kSketch;
  const int rows = rough ? a.s : a.r, tiles = (rows + kTileRows - 1) / kTileRows;
  const T* matrix = static_cast<const T*>(rough ? a.sketch : a.B);
  float* squares = rough ? w.rough : w.squares;
  const int columns = (a.d + slices * kStep - 1) / (slices * kStep) * kStep;
  const int begin = blockIdx.x % slices * columns, end = min(begin + columns, a.d);
  for (int tile = blockIdx.x / slices; tile < tiles; tile += tile_blocks / slices) {
    const int first = tile * kTileRows, here = min(kTileRows, rows - first);
    tile_product<T, NT>(matrix + static_cast<int64_t>(first) * a.d, a.d, here, x, a.x_row, a.tokens, begin,
                        end, shared, sums);
    if (!add_over_cluster(sums, a.tokens * kTileRows)) continue;
    if (!rough) {
      for (int i = threadIdx.x; i < a.tokens * kTileRows; i += blockDim.x) {
        const int token = i / kTileRows, row = i % kTileRows;
        if (row < here) w.c[static_cast<int64_t>(token) * a.r + first + row] = sums[i];
      }
    }
    for (int token = threadIdx.x; token < a.tokens; token += blockDim.x) {
      float total = 0;
      for (int row = 0; row < here; ++row)
        total += sums[token * kTileRows + row] * sums[token * kTileRows + row];
      squares[token * tiles + tile] = total;
    }
    __syncthreads();
  }
}

// A tile of the base, decision and correction.
template <typename T, int NT>
__global__ void __launch_bounds__(kWarps* kLanes, 1) project_kernel(const Decode a) {
  extern __shared__ float shared[];
  __shared__ int listed[kDecodeTokens];
  float* values = shared + blockDim.x / kLanes * 8 * NT * kStride;  // [tokens, 16]
  const int first = blockIdx.x * kTileRows, here = min(kTileRows, a.m - first);
  tile_product<T, NT>(static_cast<const T*>(a.weight) + first * a.w_row, a.w_row, here,
                      static_cast<const T*>(a.x), a.x_row, a.tokens, 0, a.d, shared, values);
  wait_for_previous();
  const Workspace w = parts_of(a);
  const int count = list_fired(a, w, listed);
  if (a.bias != nullptr) {
    const T* bias = static_cast<const T*>(a.bias) + first;
    for (int i = threadIdx.x; i < a.tokens * kTileRows; i += blockDim.x) {
      if (i % kTileRows < here) values[i] += number(bias[i % kTileRows]);
    }
  }
  __syncthreads();
  if (count > 0) {
    correct<T>(a, w, listed, count, first, here, values, kTileRows);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < a.tokens * kTileRows; i += blockDim.x) {
    const int token = i / kTileRows, row = i % kTileRows;
    if (row < here)
      round_to(static_cast<T*>(a.out) + static_cast<int64_t>(token) * a.m + first + row, values[i]);
  }
}

constexpr int kCorrectRows = 64;  // of the output, a block of correct_kernel
constexpr int kCorrectThreads = 256;

// Decision and correction where `out` holds the base's output: only tokens that fire are read and written.
template <typename T>
__global__ void __launch_bounds__(kCorrectThreads) correct_kernel(const Decode a) {
  __shared__ float values[kDecodeTokens * kCorrectRows];
  __shared__ int listed[kDecodeTokens];
  wait_for_previous();
  const Workspace w = parts_of(a);
  const int count = list_fired(a, w, listed);
  if (count == 0) return;
  const int first = blockIdx.x * kCorrectRows, here = min(kCorrectRows, a.m - first);
  T* out = static_cast<T*>(a.out) + first;
  const auto each = [&](auto&& work) {
    for (int i = threadIdx.x; i < count * here; i += blockDim.x) {
      const int token = listed[i / here], row = i % here;
      work(values[token * kCorrectRows + row], out + static_cast<int64_t>(token) * a.m + row);
    }
  };
  each([](float& value, const T* p) { value = number(*p); });
  __syncthreads();
  correct<T>(a, w, listed, count, first, here, values, kCorrectRows);
  __syncthreads();
  each([](float& value, T* p) { round_to(p, value); });
}

template <typename T, int NT>
struct Launches {
  // Blocks that share out d for one of `tiles` tiles: as many as keep every multiprocessor at one block, and
  // leave each enough columns to be worth the meeting at the end.
  static int slices_of(int tiles, int d, const Device& device) {
    int slices = 1;
    while (device.is_hopper && slices < 8 && 2 * slices * kColumns <= d &&
           2 * slices * tiles <= device.processors) {
      slices *= 2;
    }
    return slices;
  }

  static cudaError_t delta(const Decode& call, const Device& device) {
    constexpr int threads = kWarps * kLanes, bytes = shared_floats<NT>(kWarps) * sizeof(float);
    const int lengths = call.relative ? call.tokens : 0, tiles = tiles_of(call.r);
    const int slices = slices_of(tiles, call.d, device);
    if (call.sketch == nullptr) {
      return launch(&delta_kernel<T, NT, Stage::kOnly>, {(tiles + lengths) * slices, threads, bytes, slices},
                    device, call, tiles * slices, slices);
    }
    const int rough = tiles_of(call.s), cut = slices_of(rough, call.d, device);
    const cudaError_t error =
        launch(&delta_kernel<T, NT, Stage::kSketch>, {(rough + lengths) * cut, threads, bytes, cut}, device,
               call, rough * cut, cut);
    if (error != cudaSuccess) return error;
    // it waits for the sketch, beside the base's blocks: one a multiprocessor leaves them room
    const int exact = std::min(tiles * slices, device.processors / slices * slices);
    return launch(&delta_kernel<T, NT, Stage::kExact>, {exact, threads, bytes, slices}, device, call, exact,
                  slices);
  }

  static cudaError_t project(const Decode& call, const Device& device) {
    const int tiles = tiles_of(call.m);
    // a block a tile: where they are fewer than two a multiprocessor, more warps keep as many bytes in flight
    const int warps = tiles >= 3 * device.processors / 2 ? 8 : kWarps;
    const int bytes = shared_floats<NT>(warps) * sizeof(float);
    return launch(&project_kernel<T, NT>, {tiles, warps * kLanes, bytes, 1}, device, call);
  }
};

template <typename F>
cudaError_t with_types(const Decode& call, const F& work) {
  const auto by_tokens = [&]<typename T>(T) {
    return call.tokens <= 8 ? work(Launches<T, 1>()) : work(Launches<T, 2>());
  };
  return call.bf16 ? by_tokens(__nv_bfloat16()) : by_tokens(__half());
}

}  // namespace

int64_t decode_workspace(const Decode& a) {
  return static_cast<int64_t>(a.tokens) * (a.r + tiles_of(a.r) + tiles_of(a.s) + 1);
}

cudaError_t launch_delta(const Decode& call, const Device& device) {
  return with_types(call, [&](auto types) { return types.delta(call, device); });
}

cudaError_t launch_finish(const Decode& call, const Device& device) {
  if (call.weight != nullptr) {
    return with_types(call, [&](auto types) { return types.project(call, device); });
  }
  // not early: before it the stream waits for a base on another one
  const Grid grid = {(call.m + kCorrectRows - 1) / kCorrectRows, kCorrectThreads, 0, 1, false};
  return call.bf16 ? launch(&correct_kernel<__nv_bfloat16>, grid, device, call)
                   : launch(&correct_kernel<__half>, grid, device, call);
}

}  // namespace coachhook
