#include "solver/reflect_rows.h"

#include "common/micro_tile.h"
#include "solver/packed_factor.h"

namespace coachhook {
namespace {

// M's vectors that are in registers together, and the columns of K.
template <typename T, int BYTES>
constexpr int kStrip = std::min<int>(4, kBlock * sizeof(T) / BYTES);

template <typename T, int BYTES, int R, int V>
ALWAYS_INLINE void subtract_product(T* K, int64_t ld, const T* M, const T* S, Ahead& ahead) {
  tile<T, BYTES, R, V, Op::kSubtract>(K, ld, M, kBlock, 1, kBlock, S, ld, ahead);
}

// One block on R rows.
template <typename T, int BYTES, int R, bool UPPER>
ALWAYS_INLINE void reflect(const BlockReflectors<T>& b, int64_t block, T* A, int64_t row_stride, T* K,
                           Ahead& ahead) {
  using vec = typename Vector<T, BYTES>::type;
  constexpr int LANES = BYTES / sizeof(T), V = kStrip<T, BYTES>;
  const T* N = b.N + block * kBlock * kBlock;
  const T* factor = b.R + block * b.n * kBlock;
  alignas(64) T M[R * kBlock];
  for (int64_t c = 0; c < kBlock; c += V * LANES) {
    Tile<T, BYTES, R, V> m;
    m.clear();
    if constexpr (UPPER && V == 2) {  // half of the second half is zero
      m.template add<1>(A, row_stride, 1, c + LANES, N + c, kBlock, ahead);
      m.template add<1, 1>(A + c + LANES, row_stride, 1, LANES, N + (c + LANES) * kBlock + c, kBlock, ahead);
    } else {
      m.template add<1>(A, row_stride, 1, UPPER ? c + V * LANES : kBlock, N + c, kBlock, ahead);
    }
    m.template add<1>(K, b.ld, 1, b.n, factor + c, kBlock, ahead);
    m.store(M + c, kBlock);
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kBlock; c += LANES) {
      vec* a = reinterpret_cast<vec*>(A + r * row_stride + c);
      *a = *reinterpret_cast<const vec*>(M + r * kBlock + c) - *a;
    }
  }
  const T* S = b.S + block * kBlock * b.ld;
  int64_t c = 0;
  for (; c + V * LANES <= b.ld; c += V * LANES)
    subtract_product<T, BYTES, R, V>(K + c, b.ld, M, S + c, ahead);
  for (; c < b.ld; c += LANES) subtract_product<T, BYTES, R, 1>(K + c, b.ld, M, S + c, ahead);
}

template <typename T, int BYTES, int ACC, bool UPPER>
ALWAYS_INLINE void reflect_all(const BlockReflectors<T>& b, int64_t first, int64_t step, int64_t count, T* A,
                               int64_t row_stride, T* K, int64_t rows, const T* soon, int64_t soon_count) {
  constexpr int R = ACC / kStrip<T, BYTES>;
  constexpr int64_t width = kStrip<T, BYTES> * BYTES / sizeof(T);
  const int64_t inner = kBlock + b.n + (b.ld + width - 1) / width * kBlock;
  Ahead ahead(soon, soon_count, count * (rows / R) * inner);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = first + i * step;
    T* a = A + block * kBlock;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      reflect<T, BYTES, R, UPPER>(b, block, a + r * row_stride, row_stride, K + r * b.ld, ahead);
    for (; r + kFewRows <= rows; r += kFewRows)
      reflect<T, BYTES, kFewRows, UPPER>(b, block, a + r * row_stride, row_stride, K + r * b.ld, ahead);
    for (; r < rows; ++r)
      reflect<T, BYTES, 1, UPPER>(b, block, a + r * row_stride, row_stride, K + r * b.ld, ahead);
  }
}

#define COACHHOOK_ENTRY(ISA, TARGET, BYTES, ACC)                                                          \
  template <typename T>                                                                                   \
  TARGET void reflect_##ISA(const BlockReflectors<T>& b, int64_t first, int64_t step, int64_t count,      \
                            bool upper, T* A, int64_t row_stride, T* K, int64_t rows, const T* soon,      \
                            int64_t soon_count) {                                                         \
    if (upper) {                                                                                          \
      reflect_all<T, BYTES, ACC, true>(b, first, step, count, A, row_stride, K, rows, soon, soon_count);  \
    } else {                                                                                              \
      reflect_all<T, BYTES, ACC, false>(b, first, step, count, A, row_stride, K, rows, soon, soon_count); \
    }                                                                                                     \
  }

COACHHOOK_EACH_ISA(COACHHOOK_ENTRY)

}  // namespace

template <typename T>
ReflectFunction<T> reflect_rows() {
  static const ReflectFunction<T> chosen = COACHHOOK_WIDEST(reflect, T);
  return chosen;
}

template ReflectFunction<float> reflect_rows<float>();
template ReflectFunction<double> reflect_rows<double>();

}  // namespace coachhook
