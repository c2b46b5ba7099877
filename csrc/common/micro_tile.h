// The register tile that all small products are made of. Templates alone, inlined into entry points that name
// an instruction set (simd.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"

namespace coachhook {

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

enum class Op { kSet, kAdd, kSubtract };

constexpr int kRowsAPointer = 3;
constexpr int kFewRows = 4;  // of what a whole tile does not divide: alone, a row waits for itself

// R rows of V vectors, in registers from the first product to the last.
template <typename T, int BYTES, int R, int V>
struct Tile {
  using vec = typename Vector<T, BYTES>::type;
  static constexpr int LANES = BYTES / sizeof(T);
  vec acc[R][V];

  ALWAYS_INLINE void clear() {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = vec{};
    }
  }

  ALWAYS_INLINE void load(const T* C, int64_t ldc) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = *reinterpret_cast<const vec*>(C + r * ldc + v * LANES);
    }
  }

  ALWAYS_INLINE void store(T* C, int64_t ldc) const {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) *reinterpret_cast<vec*>(C + r * ldc + v * LANES) = acc[r][v];
    }
  }

  // += A B, or -= A B, in the vectors from FIRST on; B's rows begin at the first vector of the tile.
  template <int SIGN, int FIRST = 0>
  ALWAYS_INLINE void add(const T* A, int64_t row_stride, int64_t inner_stride, int64_t inner, const T* B,
                         int64_t ldb, Ahead& ahead) {
    // A pointer for every few rows: with one for all, the rows' offsets would be more than there are
    // registers, and each row's would be loaded before the row. The compiler must not see that it could.
    const T* rows[(R + kRowsAPointer - 1) / kRowsAPointer];
#pragma GCC unroll 32
    for (int r = 0; r < R; r += kRowsAPointer) {
      rows[r / kRowsAPointer] = A + r * row_stride;
      asm("" : "+r"(rows[r / kRowsAPointer]));
    }
    for (int64_t k = 0; k < inner; ++k) {
      ahead.step();
      vec b[V];
#pragma GCC unroll 8
      for (int v = FIRST; v < V; ++v) b[v] = *reinterpret_cast<const vec*>(B + k * ldb + v * LANES);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        const T a = rows[r / kRowsAPointer][r % kRowsAPointer * row_stride];
#pragma GCC unroll 8
        for (int v = FIRST; v < V; ++v) {
          if constexpr (SIGN < 0) {
            acc[r][v] -= a * b[v];
          } else {
            acc[r][v] += a * b[v];
          }
        }
      }
#pragma GCC unroll 32
      for (int r = 0; r < R; r += kRowsAPointer) rows[r / kRowsAPointer] += inner_stride;
    }
  }
};

// C = A B, C += A B or C -= A B.
template <typename T, int BYTES, int R, int V, Op OP>
ALWAYS_INLINE void tile(T* C, int64_t ldc, const T* A, int64_t row_stride, int64_t inner_stride,
                        int64_t inner, const T* B, int64_t ldb, Ahead& ahead) {
  Tile<T, BYTES, R, V> tile;
  if constexpr (OP == Op::kSet) {
    tile.clear();
  } else {
    tile.load(C, ldc);
  }
  tile.template add<OP == Op::kSubtract ? -1 : 1>(A, row_stride, inner_stride, inner, B, ldb, ahead);
  tile.store(C, ldc);
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
  for (; r + kFewRows <= rows; r += kFewRows) {
    tile<T, BYTES, kFewRows, V, OP>(C + r * ldc, ldc, A + r * row_stride, row_stride, inner_stride, inner, B,
                                    ldb, ahead);
  }
  for (; r < rows; ++r) {
    tile<T, BYTES, 1, V, OP>(C + r * ldc, ldc, A + r * row_stride, row_stride, inner_stride, inner, B, ldb,
                             ahead);
  }
}

}  // namespace coachhook
