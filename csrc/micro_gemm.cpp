#include "micro_gemm.h"

#include "micro_tile.h"

namespace coachhook {
namespace {

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
