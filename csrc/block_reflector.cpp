#include "block_reflector.h"

#include <algorithm>
#include <cmath>

#include "micro_gemm.h"
#include "packed_factor.h"
#include "simd.h"

namespace coachhook {
namespace {

COACHHOOK_CLONES double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

COACHHOOK_CLONES float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

COACHHOOK_CLONES void subtract(double* y, double a, const double* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] -= a * x[i];
}

COACHHOOK_CLONES void subtract(float* y, float a, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] -= a * x[i];
}

// X <- X^-1 for an upper triangular X [kBlock, kBlock] of nonzero diagonal.
template <typename T>
void invert_upper(const T* X, T* inverse) {
  std::fill_n(inverse, kBlock * kBlock, T(0));
  for (int64_t j = 0; j < kBlock; ++j) {
    inverse[j * kBlock + j] = T(1) / X[j * kBlock + j];
    for (int64_t i = j - 1; i >= 0; --i) {
      T sum = 0;
      for (int64_t k = i + 1; k <= j; ++k) sum += X[i * kBlock + k] * inverse[k * kBlock + j];
      inverse[i * kBlock + j] = -sum / X[i * kBlock + i];
    }
  }
}

// The reflectors of kBlock columns, one by one; the rows of K are replaced by the w's.
template <typename T>
bool reflect_columns(Mode mode, T* D, int64_t ldd, T* K, int64_t ld, int64_t n) {
  for (int64_t c = 0; c < kBlock; ++c) {
    T* w = K + c * ld;
    const T l = D[c * ldd + c];
    const T norm = std::sqrt(dot(w, w, n));
    const T square = mode == Mode::kUpdate ? l * l + norm * norm : (l - norm) * (l + norm);
    if (!(square > 0)) return false;
    const T root = std::sqrt(square);
    const T scale = T(1) / (l + root);
    for (int64_t i = 0; i < n; ++i) w[i] *= scale;
    const T omega = norm * scale;
    const T tau = T(2) / (T(1) + omega * omega);
    D[c * ldd + c] = root;
    for (int64_t r = c + 1; r < kBlock; ++r) {
      T& a = D[r * ldd + c];
      T* k = K + r * ld;
      const T kw = dot(k, w, n);
      if (mode == Mode::kUpdate) {
        const T m = tau * (a + kw);
        a = m - a;
        subtract(k, m, w, n);
      } else {
        const T before = (a - tau * kw) / (tau - T(1));
        subtract(k, a + before, w, n);
        a = before;
      }
    }
  }
  return true;
}

}  // namespace

template <typename T>
PanelReflectors<T>::PanelReflectors(int64_t width, int64_t n, int64_t ld)
    : blocks(width / kBlock),
      n(n),
      ld(ld),
      N(blocks * kBlock * kBlock),
      R(blocks * n * kBlock),
      S(blocks * kBlock * ld) {}

template <typename T>
void PanelReflectors<T>::set(int64_t index, Mode mode, const T* W) {
  T X[kBlock * kBlock] = {};  // U, or I - U to remove
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t j = i; j < kBlock; ++j) {
      T u = dot(W + i * ld, W + j * ld, n);
      if (mode == Mode::kDowndate) u = -u;
      X[i * kBlock + j] = i == j ? (T(1) + u) / 2 : u;
    }
  }
  T* inverse = N.data() + index * kBlock * kBlock;
  invert_upper(X, inverse);
  if (mode == Mode::kUndo) {
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t j = 0; j < i; ++j) std::swap(inverse[i * kBlock + j], inverse[j * kBlock + i]);
    }
  }
  const auto& gemm = micro_gemm<T>();
  T* r = R.data() + index * n * kBlock;
  std::fill_n(r, n * kBlock, T(0));
  (mode == Mode::kUpdate ? gemm.add : gemm.sub)(r, kBlock, n, kBlock, W, 1, ld, kBlock, inverse, kBlock,
                                                nullptr, 0);
  T* s = S.data() + index * kBlock * ld;
  for (int64_t i = 0; i < kBlock * ld; ++i) s[i] = mode == Mode::kUndo ? -W[i] : W[i];
}

template <typename T>
void PanelReflectors<T>::apply(int64_t index, T* A, int64_t row_stride, int64_t column_stride, T* K,
                               int64_t rows, const T* soon, int64_t soon_count) const {
  const auto& gemm = micro_gemm<T>();
  const T* inverse = N.data() + index * kBlock * kBlock;
  T* a = A + index * kBlock * column_stride;
  alignas(64) T M[kRowGroup * kBlock];
  for (int64_t done = 0; done < rows; done += kRowGroup) {
    const int64_t count = std::min(rows - done, kRowGroup);
    T* part = a + done * row_stride;
    T* k = K + done * ld;
    gemm.set(M, kBlock, count, kBlock, part, row_stride, column_stride, kBlock, inverse, kBlock, soon,
             soon_count);
    gemm.add(M, kBlock, count, kBlock, k, ld, 1, n, R.data() + index * n * kBlock, kBlock, nullptr, 0);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < kBlock; ++c) {
        T& value = part[r * row_stride + c * column_stride];
        value = M[r * kBlock + c] - value;
      }
    }
    gemm.sub(k, ld, count, ld, M, kBlock, 1, kBlock, S.data() + index * kBlock * ld, ld, nullptr, 0);
  }
}

template <typename T>
void PanelReflectors<T>::apply_all(Mode mode, T* A, int64_t row_stride, int64_t column_stride, T* K,
                                   int64_t rows) const {
  // a group of rows goes through all blocks while it is in the cache; the next group is fetched meanwhile
  for (int64_t row = 0; row < rows; row += kRowGroup) {
    T* a = A + row * row_stride;
    const int64_t share = column_stride == 1 && row + kRowGroup < rows ? kRowGroup * kBlock : 0;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t index = mode == Mode::kUndo ? blocks - 1 - i : i;
      apply(index, a, row_stride, column_stride, K + row * ld, std::min(kRowGroup, rows - row),
            a + kRowGroup * row_stride + i * share, share);
    }
  }
}

template <typename T>
bool transform_panel(Mode mode, T* D, int64_t padded, T* K, PanelReflectors<T>& reflectors) {
  const int64_t ld = reflectors.ld;
  for (int64_t i = 0; i < reflectors.blocks; ++i) {
    const int64_t index = mode == Mode::kUndo ? reflectors.blocks - 1 - i : i;
    const int64_t c = index * kBlock;
    T* k = K + c * ld;
    if (mode == Mode::kUndo) {
      reflectors.set(index, mode, k);
      std::fill_n(k, kBlock * ld, T(0));  // where the keys were rotated to nothing
      reflectors.apply(index, D + c * padded, padded, 1, k, padded - c, nullptr, 0);
    } else {
      if (!reflect_columns(mode, D + c * padded + c, padded, k, ld, reflectors.n)) return false;
      reflectors.set(index, mode, k);
      const int64_t below = c + kBlock;
      reflectors.apply(index, D + below * padded, padded, 1, K + below * ld, padded - below, nullptr, 0);
    }
  }
  return true;
}

template <typename T>
void solve_lower(const T* D, int64_t padded, T* K, int64_t ld) {
  const auto& gemm = micro_gemm<T>();
  for (int64_t c = 0; c < padded; c += kBlock) {
    T* k = K + c * ld;
    for (int64_t i = 0; i < kBlock; ++i) {
      const T* row = D + (c + i) * padded + c;
      gemm.sub(k + i * ld, ld, 1, ld, row, 0, 1, i, k, ld, nullptr, 0);
      const T scale = T(1) / row[i];
      for (int64_t j = 0; j < ld; ++j) k[i * ld + j] *= scale;
    }
    const int64_t below = c + kBlock;
    gemm.sub(K + below * ld, ld, padded - below, ld, D + below * padded + c, padded, 1, kBlock, k, ld,
             nullptr, 0);
  }
}

template <typename T>
void solve_lower_transposed(const T* D, int64_t padded, T* K, int64_t ld) {
  const auto& gemm = micro_gemm<T>();
  for (int64_t c = padded - kBlock; c >= 0; c -= kBlock) {
    T* k = K + c * ld;
    for (int64_t i = kBlock - 1; i >= 0; --i) {
      const T* column = D + (c + i) * padded + c + i;  // D(c + i, c + i), and below it D(c + j, c + i)
      gemm.sub(k + i * ld, ld, 1, ld, column + padded, 0, padded, kBlock - 1 - i, k + (i + 1) * ld, ld,
               nullptr, 0);
      const T scale = T(1) / column[0];
      for (int64_t j = 0; j < ld; ++j) k[i * ld + j] *= scale;
    }
    gemm.sub(K, ld, c, ld, D + c * padded, 1, padded, kBlock, k, ld, nullptr, 0);
  }
}

#define COACHHOOK_INSTANTIATE(T)                                                \
  template struct PanelReflectors<T>;                                           \
  template bool transform_panel<T>(Mode, T*, int64_t, T*, PanelReflectors<T>&); \
  template void solve_lower<T>(const T*, int64_t, T*, int64_t);                 \
  template void solve_lower_transposed<T>(const T*, int64_t, T*, int64_t);

COACHHOOK_INSTANTIATE(float)
COACHHOOK_INSTANTIATE(double)

}  // namespace coachhook
