// The gated projection of up to 64 tokens, bf16 or fp16:
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
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>

#include "decode.h"

namespace coachhook {
namespace {

constexpr int kLanes = 32;
constexpr int kStep = 32;  // columns that a warp takes at a time

// Warps of a block for NT times 8 tokens: products of 16 would not fit the 48 KB of shared memory at 64
// tokens.
template <int NT>
constexpr int kWarps = NT == 8 ? 8 : 16;
constexpr int kColumns = 2048;  // of d, a block of a cluster

__device__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ uint4 load_once(const void* p) {  // of a matrix that nothing reads again
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

template <typename T>
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ float warp_sum(float v) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

__device__ float number(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float number(__half v) { return __half2float(v); }
__device__ void round_to(__nv_bfloat16* p, float v) { *p = __float2bfloat16(v); }
__device__ void round_to(__half* p, float v) { *p = __float2half(v); }

// Shared memory of a block: products of each warp [warps, 8 * NT, 16 + 1], then their sums [8 * NT, 16].
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
  constexpr int kDeep = NT <= 2 ? 4 : 2;  // loads in flight
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
__global__ void __launch_bounds__(kWarps<NT>* kLanes, 1)
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

// A tile of the base, decision and correction.
template <typename T, int NT>
__global__ void __launch_bounds__(kWarps<NT>* kLanes, 1) project_kernel(const Decode a) {
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

struct Grid {
  int blocks, threads, shared_bytes;
  int cluster;        // blocks of one
  bool early = true;  // it may start beside the kernel before it (and waits for that by itself)
};

template <typename... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), const Grid& grid, const Device& device,
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = device.stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (device.is_hopper && grid.early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = grid.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
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
    constexpr int threads = kWarps<NT> * kLanes, bytes = shared_floats<NT>(kWarps<NT>) * sizeof(float);
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
    const int warps = tiles >= 3 * device.processors / 2 ? 8 : kWarps<NT>;
    const int bytes = shared_floats<NT>(warps) * sizeof(float);
    return launch(&project_kernel<T, NT>, {tiles, warps * kLanes, bytes, 1}, device, call);
  }
};

template <typename F>
cudaError_t with_types(const Decode& call, const F& work) {
  const auto by_tokens = [&]<typename T>(T) {
    if (call.tokens <= 8) return work(Launches<T, 1>());
    if (call.tokens <= 16) return work(Launches<T, 2>());
    if (call.tokens <= 32) return work(Launches<T, 4>());
    return work(Launches<T, 8>());
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
