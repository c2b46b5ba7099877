#include "narrow_rows.h"

#include <cmath>

#include "packed_factor.h"
#include "simd.h"
#include "transpose.h"

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

// V vectors of rows at a time: as many as hide a column's latency behind each other.
template <typename T, int BYTES, int N>
ALWAYS_INLINE int64_t rows_in_vectors(T* A, T* K, int64_t ld, int64_t rows, const NarrowReflectors<T>& by) {
  using vec = typename Vector<T, BYTES>::type;
  constexpr int LANES = BYTES / sizeof(T), V = 2, GROUP = V * LANES;
  int64_t done = 0;
  for (; done + GROUP <= rows; done += GROUP) {
    T* a = A + done * kPanel;
    T* keys = K + done * ld;
    const bool more = done + 2 * GROUP <= rows;
    vec k[N][V] = {};
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 32
      for (int r = 0; r < GROUP; ++r) k[i][r / LANES][r % LANES] = keys[r * ld + i];
    }
    for (int64_t c = 0; c < kPanel; c += LANES) {
      if (more) {
        const T* next = a + GROUP * (kPanel + c);
        for (int64_t ahead = 0; ahead < GROUP * LANES; ahead += 64 / sizeof(T))
          __builtin_prefetch(next + ahead);
      }
      vec t[V][LANES];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) {
          t[v][r] = *reinterpret_cast<const vec*>(a + (v * LANES + r) * kPanel + c);
        }
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
        for (int r = 0; r < LANES; ++r) {
          *reinterpret_cast<vec*>(a + (v * LANES + r) * kPanel + c) = t[v][r];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 32
      for (int r = 0; r < GROUP; ++r) keys[r * ld + i] = k[i][r / LANES][r % LANES];
    }
  }
  return done;
}

// sums [kPanel] += rows^T x for rows [4, kPanel], in the order in which they lie: memory's own prefetchers
// follow.
template <typename T, int BYTES>
ALWAYS_INLINE void add_four_rows(T* sums, const T* rows, const T (&x)[4]) {
  using vec = typename Vector<T, BYTES>::type;
  for (int64_t c = 0; c < kPanel; c += BYTES / sizeof(T)) {
    vec sum = *reinterpret_cast<const vec*>(sums + c);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sum += x[r] * *reinterpret_cast<const vec*>(rows + r * kPanel + c);
    *reinterpret_cast<vec*>(sums + c) = sum;
  }
}

template <typename T>
struct Entries {
  // rows done; what is left is less than two vectors
  int64_t (*rows)(T* A, T* K, int64_t ld, int64_t rows, const NarrowReflectors<T>& by);
  void (*add)(T* sums, const T* rows, const T (&x)[4]);
};

#define COACHHOOK_ENTRY(ISA, TARGET, BYTES, ACC)                                                   \
  template <typename T>                                                                            \
  TARGET int64_t rows_##ISA(T* A, T* K, int64_t ld, int64_t rows, const NarrowReflectors<T>& by) { \
    switch (by.n) {                                                                                \
      case 1:                                                                                      \
        return rows_in_vectors<T, BYTES, 1>(A, K, ld, rows, by);                                   \
      case 2:                                                                                      \
        return rows_in_vectors<T, BYTES, 2>(A, K, ld, rows, by);                                   \
      case 3:                                                                                      \
        return rows_in_vectors<T, BYTES, 3>(A, K, ld, rows, by);                                   \
      case 4:                                                                                      \
        return rows_in_vectors<T, BYTES, 4>(A, K, ld, rows, by);                                   \
      default:                                                                                     \
        return 0;                                                                                  \
    }                                                                                              \
  }                                                                                                \
  template <typename T>                                                                            \
  TARGET void add_##ISA(T* sums, const T* rows, const T(&x)[4]) {                                  \
    add_four_rows<T, BYTES>(sums, rows, x);                                                        \
  }

COACHHOOK_EACH_ISA(COACHHOOK_ENTRY)

template <typename T>
const Entries<T>& entries() {
  static const Entries<T> chosen = {COACHHOOK_WIDEST(rows, T), COACHHOOK_WIDEST(add, T)};
  return chosen;
}

}  // namespace

template <typename T>
template <int N>
void NarrowReflectors<T>::apply_row_of(T* A, int64_t stride, int64_t width, T* keys) const {
  T k[N][1];
  for (int i = 0; i < N; ++i) k[i][0] = keys[i];
  for (int64_t c = 0; c < width; ++c) {
    T a[1] = {A[c * stride]};
    reflect<N>(*this, c, a, k);
    A[c * stride] = a[0];
  }
  for (int i = 0; i < N; ++i) keys[i] = k[i][0];
}

template <typename T>
void NarrowReflectors<T>::apply_row(T* A, int64_t stride, int64_t width, T* k) const {
  static_assert(kNarrowKeys == 4);
  if (n == 1) return apply_row_of<1>(A, stride, width, k);
  if (n == 2) return apply_row_of<2>(A, stride, width, k);
  if (n == 3) return apply_row_of<3>(A, stride, width, k);
  apply_row_of<4>(A, stride, width, k);
}

template <typename T>
void NarrowReflectors<T>::apply_rows(T* A, T* K, int64_t ld, int64_t rows) const {
  int64_t row = entries<T>().rows(A, K, ld, rows, *this);
  for (; row < rows; ++row) apply_row(A + row * kPanel, 1, kPanel, K + row * ld);
}

template <typename T>
bool NarrowReflectors<T>::transform_triangle(Mode mode, T* packed, int64_t width, T* K, int64_t ld) {
  T* row = packed;
  for (int64_t r = 0; r < width; row += ++r) {
    T* k = K + r * ld;
    apply_row(row, 1, r, k);
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
