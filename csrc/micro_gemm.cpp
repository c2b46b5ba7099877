#include "micro_gemm.h"

#include <algorithm>

#include "simd.h"

namespace coachhook {
namespace {

enum class Op { kSet, kAdd, kSubtract };

// Asks for the next stretch of memory, a few lines at every step of the inner loop: all at once they would
// wait for each other, and the products for them. The hardware's own prefetchers stop at each page and do not
// see short rows coming.
struct Ahead {
  const char* next;
  const char* end;
  int64_t bytes_a_step;

  template <typename T>
  Ahead(const T* begin, int64_t count, int64_t steps)
      : next(reinterpret_cast<const char*>(begin)),
        end(next + count * static_cast<int64_t>(sizeof(T))),
        bytes_a_step(((end - next) / std::max<int64_t>(steps, 1) / 64 + 1) * 64) {}

  ALWAYS_INLINE void step() {
    const char* stop = std::min(next + bytes_a_step, end);
    for (; next < stop; next += 64) __builtin_prefetch(next);
  }
};

// A tile of R rows and V vectors stays in registers for the whole inner dimension.
template <typename T, int BYTES, int R, int V, Op OP>
ALWAYS_INLINE void tile(T* C, int64_t ldc, const T* A, int64_t row_stride, int64_t inner_stride,
                        int64_t inner, const T* B, int64_t ldb, Ahead& ahead) {
  using vec = typename Vector<T, BYTES>::type;
  constexpr int LANES = BYTES / sizeof(T);
  vec acc[R][V];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if constexpr (OP == Op::kSet) {
        acc[r][v] = vec{};
      } else {
        acc[r][v] = *reinterpret_cast<const vec*>(C + r * ldc + v * LANES);
      }
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    ahead.step();
    vec b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b[v] = *reinterpret_cast<const vec*>(B + k * ldb + v * LANES);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const T a = A[r * row_stride + k * inner_stride];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        if constexpr (OP == Op::kSubtract) {
          acc[r][v] -= a * b[v];
        } else {
          acc[r][v] += a * b[v];
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) *reinterpret_cast<vec*>(C + r * ldc + v * LANES) = acc[r][v];
  }
}

template <typename T, int BYTES, int ACC, int V, Op OP>
ALWAYS_INLINE void column_strip(T* C, int64_t ldc, int64_t rows, const T* A, int64_t row_stride,
                                int64_t inner_stride, int64_t inner, const T* B, int64_t ldb, Ahead& ahead) {
  constexpr int R = ACC / V;
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    tile<T, BYTES, R, V, OP>(C + r * ldc, ldc, A + r * row_stride, row_stride, inner_stride, inner, B, ldb,
                             ahead);
  }
  for (; r < rows; ++r) {
    tile<T, BYTES, 1, V, OP>(C + r * ldc, ldc, A + r * row_stride, row_stride, inner_stride, inner, B, ldb,
                             ahead);
  }
}

// ACC accumulators: as many as the register file holds beside one row of B and a broadcast.
template <typename T, int BYTES, int ACC, Op OP>
ALWAYS_INLINE void gemm(T* C, int64_t ldc, int64_t rows, int64_t cols, const T* A, int64_t row_stride,
                        int64_t inner_stride, int64_t inner, const T* B, int64_t ldb, const T* soon,
                        int64_t soon_count) {
  constexpr int LANES = BYTES / sizeof(T);
  const int64_t strip = std::min<int64_t>(4, std::max<int64_t>(1, cols / LANES)), height = ACC / strip;
  const int64_t tiles = (rows / height + rows % height) * ((cols / LANES + strip - 1) / strip);
  Ahead ahead(soon, soon_count, tiles * inner);
  for (int64_t c = 0; c < cols;) {
    const int64_t vectors = (cols - c) / LANES;
    T* out = C + c;
    const T* b = B + c;
    if (vectors >= 4) {
      column_strip<T, BYTES, ACC, 4, OP>(out, ldc, rows, A, row_stride, inner_stride, inner, b, ldb, ahead);
    } else if (vectors == 3) {
      column_strip<T, BYTES, ACC, 3, OP>(out, ldc, rows, A, row_stride, inner_stride, inner, b, ldb, ahead);
    } else if (vectors == 2) {
      column_strip<T, BYTES, ACC, 2, OP>(out, ldc, rows, A, row_stride, inner_stride, inner, b, ldb, ahead);
    } else {
      column_strip<T, BYTES, ACC, 1, OP>(out, ldc, rows, A, row_stride, inner_stride, inner, b, ldb, ahead);
    }
    c += LANES * std::min<int64_t>(vectors, 4);
  }
}

#define COACHHOOK_ENTRY(NAME, TARGET, BYTES, ACC)                                                 \
  template <typename T, Op OP>                                                                    \
  TARGET void NAME(T* C, int64_t ldc, int64_t rows, int64_t cols, const T* A, int64_t row_stride, \
                   int64_t inner_stride, int64_t inner, const T* B, int64_t ldb, const T* soon,   \
                   int64_t soon_count) {                                                          \
    gemm<T, BYTES, ACC, OP>(C, ldc, rows, cols, A, row_stride, inner_stride, inner, B, ldb, soon, \
                            soon_count);                                                          \
  }

COACHHOOK_ENTRY(gemm_generic, , 16, 8)
#if defined(__x86_64__)
COACHHOOK_ENTRY(gemm_avx2, __attribute__((target("avx2,fma"))), 32, 12)
COACHHOOK_ENTRY(gemm_avx512, __attribute__((target("avx512f,fma"))), 64, 24)
#endif

template <typename T>
MicroGemm<T> choose() {
#if defined(__x86_64__)
  if (widest_isa() == Isa::kAvx512) {
    return {gemm_avx512<T, Op::kSet>, gemm_avx512<T, Op::kAdd>, gemm_avx512<T, Op::kSubtract>, 64 / sizeof(T),
            "avx512"};
  }
  if (widest_isa() == Isa::kAvx2) {
    return {gemm_avx2<T, Op::kSet>, gemm_avx2<T, Op::kAdd>, gemm_avx2<T, Op::kSubtract>, 32 / sizeof(T),
            "avx2"};
  }
#endif
  return {gemm_generic<T, Op::kSet>, gemm_generic<T, Op::kAdd>, gemm_generic<T, Op::kSubtract>,
          16 / sizeof(T), "generic"};
}

}  // namespace

template <typename T>
const MicroGemm<T>& micro_gemm() {
  static const MicroGemm<T> chosen = choose<T>();
  return chosen;
}

template const MicroGemm<float>& micro_gemm<float>();
template const MicroGemm<double>& micro_gemm<double>();

}  // namespace coachhook
