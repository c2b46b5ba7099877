// A block takes 128 or 256 tokens, up to 128 rows of P and a slice of d. One warp has the copy engine bring
// tiles of both into a ring, two groups of four warps multiply them on the tensor cores, and where lengths
// are asked for two more warps square the tokens' tiles.
//
// Beside a base product (overlapped_base.py) blocks run one after the other on the few multiprocessors that
// the base leaves idle: it is their speed that counts, and a block should be short, since what is left when
// the base ends runs on the whole machine.
#include <array>
#include <atomic>
#include <utility>

#include "cuda/delta_product.h"
#include "cuda/matrix_unit.cuh"
#include "cuda/warpgroup_product.cuh"

namespace coachhook {
namespace {

constexpr int kRingBytes = 218 << 10;
constexpr int kGroups = 2, kGroupThreads = 128;
constexpr int kProducts = kGroups * kGroupThreads, kSquares = 2 * kLanes;  // threads
constexpr int kPause = 3000;                                               // nanoseconds
constexpr int kDevices = 64;

// N: rows of P a block, with zeros. TILES: of 64 tokens, for each group of warps.
template <int N, int TILES>
struct Ring {
  static constexpr int kTokens = kGroups * TILES * kGroupRows;
  static constexpr int kStageBytes = (kTokens + N) * kTileRowBytes;
  static constexpr int kStages = kRingBytes / kStageBytes < 8 ? kRingBytes / kStageBytes : 8;
  // From the next 1 024 bytes on; two barriers a stage.
  static constexpr int kBytes = 1024 + kStages * (kStageBytes + 2 * int{sizeof(Barrier)});
};

// Adds the squares of a row of 64 columns. Neighbours begin at different places of their rows, so that they
// read from different banks.
template <typename T>
__device__ void add_squares(const uint8_t* row, int place, float& square) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 v = *reinterpret_cast<const uint4*>(row + (place + i) % 8 * 16);
    const T* eight = reinterpret_cast<const T*>(&v);
#pragma unroll
    for (int j = 0; j < 8; ++j) square += number(eight[j]) * number(eight[j]);
  }
}

template <typename T, int N, int TILES>
__global__ void __launch_bounds__(kProducts + kSquares + kLanes, 1)
    delta_product_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap p_map,
                         const DeltaProduct a) {
  using R = Ring<N, TILES>;
  extern __shared__ uint8_t shared[];
  uint8_t* ring = shared + (1024 - shared_address(shared) % 1024) % 1024;
  Barrier *full = reinterpret_cast<Barrier*>(ring + R::kStages * R::kStageBytes), *empty = full + R::kStages;

  const int columns = (a.r + N - 1) / N;  // blocks that share a tile of x
  const int column = blockIdx.x % columns * N, slice = blockIdx.x / columns % a.slices;
  const int first = blockIdx.x / (columns * a.slices) * R::kTokens;
  const int tiles = (a.d + kTileColumns - 1) / kTileColumns, mine = (tiles - slice + a.slices - 1) / a.slices;
  const bool squares = a.lengths != nullptr && column == 0;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < R::kStages; ++stage) {
      begin_barrier(full + stage, 1);
      begin_barrier(empty + stage, (kProducts + (squares ? kSquares : 0)) / kLanes);
    }
    publish_barriers();
    prefetch(&x_map);
    prefetch(&p_map);
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x < 2) a.counts[threadIdx.x] = 0;

  if (warp == (kProducts + kSquares) / kLanes) {
    for (int i = 0; lane == 0 && i < mine; ++i) {
      // from the last columns to the first: those are what a base that ended there has left in L2
      const int stage = i % R::kStages, at = (tiles - 1 - (slice + i * a.slices)) * kTileColumns;
      uint8_t* tile = ring + stage * R::kStageBytes;
      if (i >= R::kStages) await(empty + stage, (i / R::kStages - 1) % 2);
      arrive_with(full + stage, R::kStageBytes);
      copy_tile(&x_map, tile, at, first, full + stage);
      copy_tile(&p_map, tile + R::kTokens * kTileRowBytes, at, column, full + stage);
    }
  } else if (warp >= kProducts / kLanes) {
    if (!squares) return;
    constexpr int kRows = R::kTokens / kSquares;
    const int thread = threadIdx.x - kProducts;
    float square[kRows] = {};
    for (int i = 0; i < mine; ++i) {
      const int stage = i % R::kStages;
      await(full + stage, i / R::kStages % 2);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const uint8_t* row = ring + stage * R::kStageBytes + (thread + j * kSquares) * kTileRowBytes;
        add_squares<T>(row, thread, square[j]);
      }
      __syncwarp();
      if (lane == 0) arrive(empty + stage);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int token = first + thread + j * kSquares;
      if (token < a.tokens) a.lengths[static_cast<int64_t>(slice) * a.tokens + token] = square[j];
    }
  } else {
    const int group = warp / 4;
    float acc[TILES][N / 2] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) settle(acc[tile]);
    for (int i = 0; i < mine; ++i) {
      const int stage = i % R::kStages;
      const uint8_t* p = ring + stage * R::kStageBytes + R::kTokens * kTileRowBytes;
      const uint8_t* x = ring + stage * R::kStageBytes + group * TILES * kGroupRows * kTileRowBytes;
      await(full + stage, i / R::kStages % 2);
      const uint64_t p_tile = operand(p), x_tile = operand(x);
      begin_products();
#pragma unroll
      for (int step = 0; step < kTileColumns / kGroupStep; ++step) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          add_product<T, N>(acc[tile],
                            x_tile + tile * (kGroupRows * kTileRowBytes / 16) + step * kOperandStep,
                            p_tile + step * kOperandStep);
        }
      }
      commit_products();
      await_products<1>();  // of the tile before
      __syncwarp();
      if (i > 0 && lane == 0) arrive(empty + (i - 1) % R::kStages);
    }
    await_products<0>();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      settle(acc[tile]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first + (group * TILES + tile) * kGroupRows + warp % 4 * 16 + lane / 4 + 8 * half;
        if (token >= a.tokens) continue;
        float* row = a.values + (static_cast<int64_t>(slice) * a.tokens + token) * a.c_row;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
          const int to = column + 8 * j + 2 * (lane % 4);
          if (to < a.c_row)
            *reinterpret_cast<float2*>(row + to) =
                make_float2(acc[tile][4 * j + 2 * half], acc[tile][4 * j + 2 * half + 1]);
        }
      }
    }
  }
}

// Ends a little later than it begins.
__global__ void pause_kernel() {
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < kPause);
}

// Loads the kernel's code, which the runtime else does at its first launch: here that is always one into a
// graph.
template <typename T, int N, int TILES>
bool is_there() {
  return cudaFuncSetAttribute(delta_product_kernel<T, N, TILES>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              Ring<N, TILES>::kBytes) == cudaSuccess;
}

template <typename T, int N, int TILES>
cudaError_t launch_with(const DeltaProduct& call, cudaStream_t stream) {
  using R = Ring<N, TILES>;
  CUtensorMap x, p;
  cudaError_t error = describe(x, call.bf16, call.x, call.tokens, call.d, call.x_row, R::kTokens);
  if (error == cudaSuccess) error = describe(p, call.bf16, call.p, call.r, call.d, call.p_row, N);
  if (error != cudaSuccess) return error;
  pause_kernel<<<1, 1, 0, stream>>>();
  const int blocks = (call.tokens + R::kTokens - 1) / R::kTokens * call.slices * ((call.r + N - 1) / N);
  delta_product_kernel<T, N, TILES><<<blocks, kProducts + kSquares + kLanes, R::kBytes, stream>>>(x, p, call);
  return cudaGetLastError();
}

template <typename T, int N>
cudaError_t launch_of(const DeltaProduct& call, cudaStream_t stream) {
  return call.block > 128 ? launch_with<T, N, 2>(call, stream) : launch_with<T, N, 1>(call, stream);
}

template <typename T>
cudaError_t launch_for(const DeltaProduct& call, cudaStream_t stream) {
  if (call.r <= 16) return launch_of<T, 16>(call, stream);
  if (call.r <= 32) return launch_of<T, 32>(call, stream);
  if (call.r <= 64) return launch_of<T, 64>(call, stream);
  return call.r <= 112 ? launch_of<T, 112>(call, stream) : launch_of<T, 128>(call, stream);
}

template <typename T, int... N>
bool are_there(std::integer_sequence<int, N...>) {
  return ((is_there<T, N, 1>() && is_there<T, N, 2>()) && ...);
}

// Of the driver: the Triton kernels that follow are loaded while a graph is recorded.
constexpr int kLoadsIntoGraphs = 12030;

bool asked() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver < kLoadsIntoGraphs) return false;
  using Rows = std::integer_sequence<int, 16, 32, 64, 112, 128>;  // as in launch_for
  cudaFuncAttributes pause;
  if (are_there<__half>(Rows{}) && are_there<__nv_bfloat16>(Rows{}) &&
      cudaFuncGetAttributes(&pause, pause_kernel) == cudaSuccess)
    return tiled() != nullptr;
  cudaGetLastError();  // it is no error: there is no code for this GPU
  return false;
}

}  // namespace

bool has_delta_product() {
  static std::array<std::atomic<int>, kDevices> known;  // one more than the answer; 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return asked();
  if (known[device] == 0) known[device] = asked() + 1;
  return known[device] > 1;
}

cudaError_t launch_delta_product(const DeltaProduct& call, cudaStream_t stream) {
  return call.bf16 ? launch_for<__nv_bfloat16>(call, stream) : launch_for<__half>(call, stream);
}

}  // namespace coachhook
