#include "solver/narrow_rows.h"

#include <cmath>

#include "common/simd.h"
#include "common/transpose.h"
#include "solver/packed_factor.h"

namespace coachhook {
namespace {

// Column c for entries t and their keys k, V vectors (or numbers) of each.
template <int N, int V, typename T, typename vec>
ALWAYS_INLINE void reflect(const NarrowReflectors<T>& by, int64_t c, vec (&t)[V], vec (&k)[N][V]) {
  const T *beta = by.beta.data() + c * N, *w = by.w.data() + c * N;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    vec next = by.alpha[c] * t[v];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) next += beta[i] * k[i][v];
    if constexpr (N == 1) {
      k[0][v] = by.gamma[c] * k[0][v] - by.delta[c] * t[v];
    } else {
      const vec both = t[v] + next;
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) k[i][v] -= w[i] * both;
    }
    t[v] = next;
  }
}

// Rows that go through the columns together, V vectors of them: as many as hide a column's latency behind
// each other.
constexpr int V = 2;

template <typename T, int BYTES>
constexpr int64_t kGroup = V * BYTES / sizeof(T);

// A group of rows, row(0) .. , over the first `width` columns, with their keys K. What lies `ahead` is on its
// way to the second cache meanwhile: the first one has too few requests under way to keep up with the memory.
template <typename T, int BYTES, int N, typename Row>
ALWAYS_INLINE void group_of_rows(const Row& row, int64_t width, const T* ahead, T* K, int64_t ld,
                                 const NarrowReflectors<T>& by) {
  using vec = typename Vector<T, BYTES>::type;
  constexpr int LANES = BYTES / sizeof(T), GROUP = kGroup<T, BYTES>;
  vec k[N][V] = {};
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < GROUP; ++r) k[i][r / LANES][r % LANES] = K[r * ld + i];
  }
  for (int64_t c = 0; c < width; c += LANES) {
    for (int64_t i = 0; ahead != nullptr && i < GROUP * LANES; i += 64 / sizeof(T)) {
      __builtin_prefetch(ahead + GROUP * c + i, 0, 2);
    }
    vec t[V][LANES];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) t[v][r] = *reinterpret_cast<const vec*>(row(v * LANES + r) + c);
      Transpose<T, BYTES>::run(t[v]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) {
      vec column[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) column[v] = t[v][j];
      reflect<N>(by, c + j, column, k);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) t[v][j] = column[v];
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      Transpose<T, BYTES>::run(t[v]);
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) *reinterpret_cast<vec*>(row(v * LANES + r) + c) = t[v][r];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 32
    for (int r = 0; r < GROUP; ++r) K[r * ld + i] = k[i][r / LANES][r % LANES];
  }
}

// Whole groups of the rows A [rows, kPanel]; how many rows they were.
template <typename T, int BYTES, int N>
ALWAYS_INLINE int64_t rows_in_vectors(T* A, T* K, int64_t ld, int64_t rows, const NarrowReflectors<T>& by) {
  constexpr int64_t GROUP = kGroup<T, BYTES>, AHEAD = 4 * GROUP * kPanel;
  int64_t done = 0;
  for (; done + GROUP <= rows; done += GROUP) {
    T* a = A + done * kPanel;
    // behind the last row too: most likely the next task's
    group_of_rows<T, BYTES, N>([a](int64_t r) { return a + r * kPanel; }, kPanel, a + AHEAD, K + done * ld,
                               ld, by);
  }
  return done;
}

// The group of rows of a packed triangle that begins with row `first`, over the columns before it.
template <typename T, int BYTES, int N>
ALWAYS_INLINE void triangle_in_vectors(T* packed, int64_t first, T* K, int64_t ld,
                                       const NarrowReflectors<T>& by) {
  group_of_rows<T, BYTES, N>([=](int64_t r) { return packed + packed_size(first + r); }, first, nullptr,
                             K + first * ld, ld, by);
}

constexpr int64_t kAhead = 32;  // rows

// sums [kPanel] += rows^T x for rows [4, kPanel].
template <typename T, int BYTES>
ALWAYS_INLINE void add_four_rows(T* sums, const T* rows, const T (&x)[4]) {
  using vec = typename Vector<T, BYTES>::type;
  for (int64_t c = 0; c < kPanel; c += BYTES / sizeof(T)) {
    vec sum = *reinterpret_cast<const vec*>(sums + c);
    for (int64_t i = 0; i < 4 * BYTES; i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(rows + kAhead * kPanel + 4 * c) + i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sum += x[r] * *reinterpret_cast<const vec*>(rows + r * kPanel + c);
    *reinterpret_cast<vec*>(sums + c) = sum;
  }
}

template <typename T>
struct Entries {
  int64_t group;
  // rows done; what is left is less than a group
  int64_t (*rows)(T* A, T* K, int64_t ld, int64_t rows, const NarrowReflectors<T>& by);
  void (*triangle)(T* packed, int64_t first, T* K, int64_t ld, const NarrowReflectors<T>& by);
  void (*add)(T* sums, const T* rows, const T (&x)[4]);
};

#define COACHHOOK_ENTRY(ISA, TARGET, BYTES, ACC)                                                          \
  template <typename T>                                                                                   \
  TARGET int64_t rows_##ISA(T* A, T* K, int64_t ld, int64_t rows, const NarrowReflectors<T>& by) {        \
    switch (by.n) {                                                                                       \
      case 1:                                                                                             \
        return rows_in_vectors<T, BYTES, 1>(A, K, ld, rows, by);                                          \
      case 2:                                                                                             \
        return rows_in_vectors<T, BYTES, 2>(A, K, ld, rows, by);                                          \
      case 3:                                                                                             \
        return rows_in_vectors<T, BYTES, 3>(A, K, ld, rows, by);                                          \
      case 4:                                                                                             \
        return rows_in_vectors<T, BYTES, 4>(A, K, ld, rows, by);                                          \
      default:                                                                                            \
        return 0;                                                                                         \
    }                                                                                                     \
  }                                                                                                       \
  template <typename T>                                                                                   \
  TARGET void triangle_##ISA(T* packed, int64_t first, T* K, int64_t ld, const NarrowReflectors<T>& by) { \
    static_assert(kNarrowKeys == 4);                                                                      \
    if (by.n == 1) return triangle_in_vectors<T, BYTES, 1>(packed, first, K, ld, by);                     \
    if (by.n == 2) return triangle_in_vectors<T, BYTES, 2>(packed, first, K, ld, by);                     \
    if (by.n == 3) return triangle_in_vectors<T, BYTES, 3>(packed, first, K, ld, by);                     \
    triangle_in_vectors<T, BYTES, 4>(packed, first, K, ld, by);                                           \
  }                                                                                                       \
  template <typename T>                                                                                   \
  TARGET void add_##ISA(T* sums, const T* rows, const T(&x)[4]) {                                         \
    add_four_rows<T, BYTES>(sums, rows, x);                                                               \
  }                                                                                                       \
  template <typename T>                                                                                   \
  constexpr int64_t group_##ISA() {                                                                       \
    return kGroup<T, BYTES>;                                                                              \
  }

COACHHOOK_EACH_ISA(COACHHOOK_ENTRY)

template <typename T>
const Entries<T>& entries() {
  static const Entries<T> chosen = {COACHHOOK_WIDEST(group, T)(), COACHHOOK_WIDEST(rows, T),
                                    COACHHOOK_WIDEST(triangle, T), COACHHOOK_WIDEST(add, T)};
  return chosen;
}

}  // namespace

template <typename T>
template <int N>
void NarrowReflectors<T>::apply_row_of(T* A, int64_t stride, int64_t first, int64_t end, T* keys) const {
  T k[N][1];
  for (int i = 0; i < N; ++i) k[i][0] = keys[i];
  for (int64_t c = first; c < end; ++c) {
    T a[1] = {A[c * stride]};
    reflect<N>(*this, c, a, k);
    A[c * stride] = a[0];
  }
  for (int i = 0; i < N; ++i) keys[i] = k[i][0];
}

template <typename T>
void NarrowReflectors<T>::apply_row(T* A, int64_t stride, int64_t first, int64_t end, T* k) const {
  static_assert(kNarrowKeys == 4);
  if (n == 1) return apply_row_of<1>(A, stride, first, end, k);
  if (n == 2) return apply_row_of<2>(A, stride, first, end, k);
  if (n == 3) return apply_row_of<3>(A, stride, first, end, k);
  apply_row_of<4>(A, stride, first, end, k);
}

template <typename T>
void NarrowReflectors<T>::apply_rows(T* A, T* K, int64_t ld, int64_t rows) const {
  int64_t row = entries<T>().rows(A, K, ld, rows, *this);
  for (; row < rows; ++row) apply_row(A + row * kPanel, 1, 0, kPanel, K + row * ld);
}

template <typename T>
bool NarrowReflectors<T>::transform_triangle(Mode mode, T* packed, int64_t width, T* K, int64_t ld) {
  T* row = packed;
  int64_t done = 0;  // columns that the rows at hand have behind them
  for (int64_t r = 0; r < width; row += ++r) {
    if (r % entries<T>().group == 0 && r + entries<T>().group <= width) {
      entries<T>().triangle(packed, r, K, ld, *this);
      done = r;
    } else if (r % entries<T>().group == 0) {
      done = 0;
    }
    T* k = K + r * ld;
    apply_row(row, 1, done, r, k);
    T square = 0;
    for (int64_t i = 0; i < n; ++i) square += k[i] * k[i];
    const T l = row[r], norm = std::sqrt(square);
    const T after = mode == Mode::kUpdate ? l * l + square : (l - norm) * (l + norm);
    if (!(after > 0)) return false;
    row[r] = std::sqrt(after);
    const T scale = T(1) / (l + row[r]);
    const T omega = norm * scale;
    const T tau = T(2) / (T(1) + omega * omega);
    alpha[r] = mode == Mode::kUpdate ? tau - T(1) : T(1) / (tau - T(1));
    const T factor = mode == Mode::kUpdate ? tau : -tau * alpha[r];
    for (int64_t i = 0; i < n; ++i) {
      w[r * n + i] = k[i] *= scale;
      beta[r * n + i] = factor * k[i];
    }
    delta[r] = (T(1) + alpha[r]) * w[r * n];
    gamma[r] = T(1) - beta[r * n] * w[r * n];
  }
  return true;
}

template <typename T>
void solve_packed_transposed(const T* packed, int64_t width, T* x, int64_t ld, int64_t n) {
  T column[kPanel];
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < width; ++r) column[r] = x[r * ld + i];
    for (int64_t r = width - 1; r >= 0; --r) {
      const T* row = packed + packed_size(r);
      const T value = column[r] /= row[r];
#pragma omp simd
      for (int64_t c = 0; c < r; ++c) column[c] -= row[c] * value;
    }
    for (int64_t r = 0; r < width; ++r) x[r * ld + i] = column[r];
  }
}

template <typename T>
void subtract_rows(const T* rows, int64_t count, const T* x, T* out, int64_t ld, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T sums[kPanel] = {};
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      const T* at = x + r * ld + i;
      entries<T>().add(sums, rows + r * kPanel, {at[0], at[ld], at[2 * ld], at[3 * ld]});
    }
    for (; r < count; ++r) {
      for (int64_t c = 0; c < kPanel; ++c) sums[c] += x[r * ld + i] * rows[r * kPanel + c];
    }
    for (int64_t c = 0; c < kPanel; ++c) out[c * ld + i] -= sums[c];
  }
}

#define COACHHOOK_INSTANTIATE(T)                                                     \
  template struct NarrowReflectors<T>;                                               \
  template void solve_packed_transposed<T>(const T*, int64_t, T*, int64_t, int64_t); \
  template void subtract_rows<T>(const T*, int64_t, const T*, T*, int64_t, int64_t);

COACHHOOK_INSTANTIATE(float)
COACHHOOK_INSTANTIATE(double)

}  // namespace coachhook
