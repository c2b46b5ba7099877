#include "solver/block_reflector.h"

#include <algorithm>

#include "common/micro_gemm.h"
#include "solver/packed_factor.h"
#include "solver/reflect_columns.h"

namespace coachhook {
template <typename T>
PanelReflectors<T>::PanelReflectors(int64_t width, int64_t n, int64_t ld)
    : blocks(width / kBlock),
      n(n),
      ld(ld),
      N(blocks * kBlock * kBlock),
      R(blocks * n * kBlock),
      S(blocks * kBlock * ld) {}

template <typename T>
void PanelReflectors<T>::set(int64_t index, Mode mode, const T* Wt) {
  const auto& gemm = micro_gemm<T>();
  alignas(64) T X[kBlock * kBlock];  // W W^T, then U, or I - U to remove
  gemm.set(X, kBlock, kBlock, kBlock, Wt, 1, kBlock, n, Wt, kBlock, nullptr, 0);
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t j = 0; j < kBlock; ++j) {
      T& u = X[i * kBlock + j];
      if (mode == Mode::kDowndate) u = -u;
      u = j < i ? T(0) : j == i ? (T(1) + u) / 2 : u;
    }
  }
  T* inverse = N.data() + index * kBlock * kBlock;
  invert_upper(X, inverse);
  if (mode == Mode::kUndo) {
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t j = 0; j < i; ++j) std::swap(inverse[i * kBlock + j], inverse[j * kBlock + i]);
    }
  }
  T* r = R.data() + index * n * kBlock;
  std::fill_n(r, n * kBlock, T(0));
  (mode == Mode::kUpdate ? gemm.add : gemm.sub)(r, kBlock, n, kBlock, Wt, kBlock, 1, kBlock, inverse, kBlock,
                                                nullptr, 0);
  T* s = S.data() + index * kBlock * ld;
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t k = 0; k < n; ++k)
      s[i * ld + k] = mode == Mode::kUndo ? -Wt[k * kBlock + i] : Wt[k * kBlock + i];
  }
}

template <typename T>
BlockReflectors<T> PanelReflectors<T>::from(int64_t index) const {
  return {n, ld, N.data() + index * kBlock * kBlock, R.data() + index * n * kBlock,
          S.data() + index * kBlock * ld};
}

template <typename T>
void PanelReflectors<T>::apply_all(Mode mode, T* A, int64_t row_stride, T* K, int64_t rows) const {
  // a group of rows goes through all blocks while it is in the cache; the next group is fetched meanwhile
  const bool back = mode == Mode::kUndo;
  for (int64_t row = 0; row < rows; row += kRowGroup) {
    T* a = A + row * row_stride;
    const int64_t next = row + kRowGroup < rows ? kRowGroup * row_stride : 0;
    reflect_rows<T>()(from(0), back ? blocks - 1 : 0, back ? -1 : 1, blocks, !back, a, row_stride,
                      K + row * ld, std::min(kRowGroup, rows - row), a + next, next);
  }
}

template <typename T>
void PanelReflectors<T>::apply_columns(T* A, int64_t ld_a, T* K, int64_t rows) const {
  alignas(64) T part[kRowGroup * kBlock];
  for (int64_t row = 0; row < rows; row += kRowGroup) {
    const int64_t count = std::min(kRowGroup, rows - row);
    for (int64_t i = 0; i < blocks; ++i) {
      T* a = A + i * kBlock * ld_a + row;
      for (int64_t c = 0; c < kBlock; ++c) {
        for (int64_t r = 0; r < count; ++r) part[r * kBlock + c] = a[c * ld_a + r];
      }
      reflect_rows<T>()(from(i), 0, 1, 1, true, part, kBlock, K + row * ld, count, nullptr, 0);
      for (int64_t c = 0; c < kBlock; ++c) {
        for (int64_t r = 0; r < count; ++r) a[c * ld_a + r] = part[r * kBlock + c];
      }
    }
  }
}

template <typename T>
bool transform_panel(Mode mode, T* D, int64_t padded, T* K, PanelReflectors<T>& reflectors) {
  const int64_t ld = reflectors.ld, n = reflectors.n;
  std::vector<T> Kt(n * kBlock);
  for (int64_t i = 0; i < reflectors.blocks; ++i) {
    const int64_t index = mode == Mode::kUndo ? reflectors.blocks - 1 - i : i;
    const int64_t c = index * kBlock;
    T* k = K + c * ld;
    for (int64_t r = 0; r < kBlock; ++r) {
      for (int64_t i = 0; i < n; ++i) Kt[i * kBlock + r] = k[r * ld + i];
    }
    if (mode == Mode::kUndo) {
      reflectors.set(index, mode, Kt.data());
      std::fill_n(k, kBlock * ld, T(0));  // where the keys were rotated to nothing
      reflect_rows<T>()(reflectors.from(index), 0, 1, 1, false, D + c * padded + c, padded, k, padded - c,
                        nullptr, 0);
    } else {
      if (!reflect_columns(mode == Mode::kDowndate, D + c * padded + c, padded, Kt.data(), n)) return false;
      reflectors.set(index, mode, Kt.data());
      for (int64_t r = 0; r < kBlock; ++r) {
        for (int64_t i = 0; i < n; ++i) k[r * ld + i] = Kt[i * kBlock + r];
      }
      const int64_t below = c + kBlock;
      reflect_rows<T>()(reflectors.from(index), 0, 1, 1, true, D + below * padded + c, padded, K + below * ld,
                        padded - below, nullptr, 0);
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
