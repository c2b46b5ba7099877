// One small dense kernel, C = A B, C += A B or C -= A B, for blocks that live in the first two caches. MKL's
// dgemm reaches 2 to 4 GB/s on the tall, skinny products of cholesky.cpp (measured,
// docs/experiments/solver-choices.md); this one streams at the memory's own rate.
#pragma once

#include <cstdint>

namespace coachhook {

// C [rows, cols] row-major with leading dimension ldc; A(r, k) = A[r * row_stride + k * inner_stride];
// B [inner, cols] row-major with leading dimension ldb. `cols` must be a multiple of `lanes`. `soon`
// [soon_count] is what the caller will read next; it is asked for meanwhile.
template <typename T>
using GemmFunction = void (*)(T* C, int64_t ldc, int64_t rows, int64_t cols, const T* A, int64_t row_stride,
                              int64_t inner_stride, int64_t inner, const T* B, int64_t ldb, const T* soon,
                              int64_t soon_count);

template <typename T>
struct MicroGemm {
  GemmFunction<T> set;  // C = A B
  GemmFunction<T> add;  // C += A B
  GemmFunction<T> sub;  // C -= A B
  int64_t lanes;        // elements of one vector register
  const char* isa;
};

// The widest version that this processor runs; chosen once.
template <typename T>
const MicroGemm<T>& micro_gemm();

}  // namespace coachhook
