// Products of swizzled tiles in shared memory (bulk_copy.cuh) on the tensor cores of a Hopper GPU: four warps
// together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/bulk_copy.cuh"

namespace coachhook {
namespace {

constexpr int kGroupRows = 64;  // of the first factor
constexpr int kGroupStep = 16;  // columns of both

// A tile whose first row is a multiple of eight, from its first column on; `kOperandStep` more is the next
// step.
__device__ uint64_t operand(const void* tile) {
  constexpr uint64_t kSwizzled = uint64_t{1} << 62, kEightRows = uint64_t{8 * kTileRowBytes / 16} << 32,
                     kUnused = 1 << 16;
  return kSwizzled | kEightRows | kUnused | shared_address(tile) / 16;
}

constexpr int kOperandStep = 2 * kGroupStep / 16;

__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the last `PENDING` that were committed.
template <int PENDING>
__device__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler moves nothing of these numbers over this place: products that are under way write them.
template <int COUNT>
__device__ void settle(float (&acc)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// The instruction names every number that it adds to: 8 of them a line, N / 2 in all.
// clang-format off
#define COACHHOOK_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define COACHHOOK_NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define COACHHOOK_NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define COACHHOOK_NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define COACHHOOK_NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define COACHHOOK_NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define COACHHOOK_NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define COACHHOOK_NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define COACHHOOK_SUMS_0 "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]), "+f"(acc[4]), "+f"(acc[5]), "+f"(acc[6]), "+f"(acc[7])
#define COACHHOOK_SUMS_1 "+f"(acc[8]), "+f"(acc[9]), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), "+f"(acc[14]), "+f"(acc[15])
#define COACHHOOK_SUMS_2 "+f"(acc[16]), "+f"(acc[17]), "+f"(acc[18]), "+f"(acc[19]), "+f"(acc[20]), "+f"(acc[21]), "+f"(acc[22]), "+f"(acc[23])
#define COACHHOOK_SUMS_3 "+f"(acc[24]), "+f"(acc[25]), "+f"(acc[26]), "+f"(acc[27]), "+f"(acc[28]), "+f"(acc[29]), "+f"(acc[30]), "+f"(acc[31])
#define COACHHOOK_SUMS_4 "+f"(acc[32]), "+f"(acc[33]), "+f"(acc[34]), "+f"(acc[35]), "+f"(acc[36]), "+f"(acc[37]), "+f"(acc[38]), "+f"(acc[39])
#define COACHHOOK_SUMS_5 "+f"(acc[40]), "+f"(acc[41]), "+f"(acc[42]), "+f"(acc[43]), "+f"(acc[44]), "+f"(acc[45]), "+f"(acc[46]), "+f"(acc[47])
#define COACHHOOK_SUMS_6 "+f"(acc[48]), "+f"(acc[49]), "+f"(acc[50]), "+f"(acc[51]), "+f"(acc[52]), "+f"(acc[53]), "+f"(acc[54]), "+f"(acc[55])
#define COACHHOOK_SUMS_7 "+f"(acc[56]), "+f"(acc[57]), "+f"(acc[58]), "+f"(acc[59]), "+f"(acc[60]), "+f"(acc[61]), "+f"(acc[62]), "+f"(acc[63])
#define COACHHOOK_NAMES_N16 COACHHOOK_NAMES_0
#define COACHHOOK_NAMES_N32 COACHHOOK_NAMES_N16 COACHHOOK_NAMES_1
#define COACHHOOK_NAMES_N64 COACHHOOK_NAMES_N32 COACHHOOK_NAMES_2 COACHHOOK_NAMES_3
#define COACHHOOK_NAMES_N112 COACHHOOK_NAMES_N64 COACHHOOK_NAMES_4 COACHHOOK_NAMES_5 COACHHOOK_NAMES_6
#define COACHHOOK_NAMES_N128 COACHHOOK_NAMES_N112 COACHHOOK_NAMES_7
#define COACHHOOK_SUMS_N16 COACHHOOK_SUMS_0
#define COACHHOOK_SUMS_N32 COACHHOOK_SUMS_N16, COACHHOOK_SUMS_1
#define COACHHOOK_SUMS_N64 COACHHOOK_SUMS_N32, COACHHOOK_SUMS_2, COACHHOOK_SUMS_3
#define COACHHOOK_SUMS_N112 COACHHOOK_SUMS_N64, COACHHOOK_SUMS_4, COACHHOOK_SUMS_5, COACHHOOK_SUMS_6
#define COACHHOOK_SUMS_N128 COACHHOOK_SUMS_N112, COACHHOOK_SUMS_7
#define COACHHOOK_PRODUCT(N, TYPE, A, B)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"              \
               COACHHOOK_NAMES_N##N "}, %" #A ", %" #B ", 1, 1, 1, 0, 0;"                         \
               : COACHHOOK_SUMS_N##N : "l"(a), "l"(b))
#define COACHHOOK_PRODUCT_OF(N, A, B)                                                            \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) COACHHOOK_PRODUCT(N, "bf16", A, B);            \
  else COACHHOOK_PRODUCT(N, "f16", A, B)
// clang-format on

// acc += a b^T, a [64, 16], b [N, 16]; acc[4 j + 2 h + p] is of row 16 (warp of the four) + lane / 4 + 8 h
// and column 8 j + 2 (lane % 4) + p.
template <typename T, int N>
__device__ void add_product(float (&acc)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 112 || N == 128);
  if constexpr (N == 16) {
    COACHHOOK_PRODUCT_OF(16, 8, 9);
  } else if constexpr (N == 32) {
    COACHHOOK_PRODUCT_OF(32, 16, 17);
  } else if constexpr (N == 64) {
    COACHHOOK_PRODUCT_OF(64, 32, 33);
  } else if constexpr (N == 112) {
    COACHHOOK_PRODUCT_OF(112, 56, 57);
  } else {
    COACHHOOK_PRODUCT_OF(128, 64, 65);
  }
}

}  // namespace
}  // namespace coachhook
