#include "common/micro_gemm.h"

#include "common/micro_tile.h"

namespace coachhook {
namespace {

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

#define COACHHOOK_ENTRY(ISA, TARGET, BYTES, ACC)                                                        \
  template <typename T, Op OP>                                                                          \
  TARGET void gemm_##ISA(T* C, int64_t ldc, int64_t rows, int64_t cols, const T* A, int64_t row_stride, \
                         int64_t inner_stride, int64_t inner, const T* B, int64_t ldb, const T* soon,   \
                         int64_t soon_count) {                                                          \
    gemm<T, BYTES, ACC, OP>(C, ldc, rows, cols, A, row_stride, inner_stride, inner, B, ldb, soon,       \
                            soon_count);                                                                \
  }

COACHHOOK_EACH_ISA(COACHHOOK_ENTRY)

}  // namespace

template <typename T>
const MicroGemm<T>& micro_gemm() {
  static const MicroGemm<T> chosen = {
      COACHHOOK_WIDEST(gemm, T, Op::kSet), COACHHOOK_WIDEST(gemm, T, Op::kAdd),
      COACHHOOK_WIDEST(gemm, T, Op::kSubtract), vector_bytes(widest_isa()) / static_cast<int64_t>(sizeof(T)),
      name_of(widest_isa())};
  return chosen;
}

template const MicroGemm<float>& micro_gemm<float>();
template const MicroGemm<double>& micro_gemm<double>();

}  // namespace coachhook
