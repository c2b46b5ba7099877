#include "solver/reflect_columns.h"

#include <cmath>

#include "common/simd.h"
#include "solver/packed_factor.h"

namespace coachhook {
namespace {

// One number for each of kBlock rows or columns; the compiler makes as many registers of it as it takes.
template <typename T>
using Block = typename Vector<T, kBlock * sizeof(T)>::type;

template <typename T>
ALWAYS_INLINE Block<T>& block(T* p) {
  return *reinterpret_cast<Block<T>*>(p);
}

template <typename T>
ALWAYS_INLINE const Block<T>& block(const T* p) {
  return *reinterpret_cast<const Block<T>*>(p);
}

// All kBlock rows at once: they lie next to each other in Kt, so there is no sum across a vector.
template <typename T>
ALWAYS_INLINE bool reflect(bool removes, T* D, int64_t ldd, T* Kt, int64_t n) {
  for (int64_t c = 0; c < kBlock; ++c) {
    Block<T> even = {}, odd = {};  // of every row's keys with this one's
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      even += Kt[i * kBlock + c] * block(Kt + i * kBlock);
      odd += Kt[(i + 1) * kBlock + c] * block(Kt + (i + 1) * kBlock);
    }
    if (i < n) even += Kt[i * kBlock + c] * block(Kt + i * kBlock);
    alignas(64) T dot[kBlock];
    block(dot) = even + odd;
    const T l = D[c * ldd + c], norm = std::sqrt(dot[c]);
    const T square = removes ? (l - norm) * (l + norm) : l * l + norm * norm;
    if (!(square > 0)) return false;
    const T root = std::sqrt(square), scale = T(1) / (l + root), omega = norm * scale;
    const T tau = T(2) / (T(1) + omega * omega);
    D[c * ldd + c] = root;
    alignas(64) T m[kBlock] = {};     // of the rows below, times w
    alignas(64) T keep[kBlock] = {};  // what else becomes of the rows: this one's is w
    for (int64_t r = 0; r < c; ++r) keep[r] = 1;
    keep[c] = scale;
    for (int64_t r = c + 1; r < kBlock; ++r) {
      T& a = D[r * ldd + c];
      const T kw = dot[r] * scale;
      if (removes) {
        const T before = (a - tau * kw) / (tau - T(1));
        m[r] = (a + before) * scale;
        a = before;
      } else {
        const T sum = tau * (a + kw);
        m[r] = sum * scale;
        a = sum - a;
      }
      keep[r] = 1;
    }
    const Block<T> times = block(m), kept = block(keep);
    for (int64_t k = 0; k < n; ++k) {
      Block<T>& row = block(Kt + k * kBlock);
      row = row * kept - Kt[k * kBlock + c] * times;
    }
  }
  return true;
}

template <typename T>
ALWAYS_INLINE void invert(const T* X, T* inverse) {
  for (int64_t i = kBlock - 1; i >= 0; --i) {
    Block<T> even = {}, odd = {};
    int64_t k = i + 1;
    for (; k + 2 <= kBlock; k += 2) {
      even -= X[i * kBlock + k] * block(inverse + k * kBlock);
      odd -= X[i * kBlock + k + 1] * block(inverse + (k + 1) * kBlock);
    }
    if (k < kBlock) even -= X[i * kBlock + k] * block(inverse + k * kBlock);
    T* row = inverse + i * kBlock;
    block(row) = even + odd;
    row[i] = 1;
    block(row) *= T(1) / X[i * kBlock + i];
  }
}

}  // namespace

COACHHOOK_CLONES bool reflect_columns(bool removes, double* D, int64_t ldd, double* Kt, int64_t n) {
  return reflect(removes, D, ldd, Kt, n);
}

COACHHOOK_CLONES bool reflect_columns(bool removes, float* D, int64_t ldd, float* Kt, int64_t n) {
  return reflect(removes, D, ldd, Kt, n);
}

COACHHOOK_CLONES void invert_upper(const double* X, double* inverse) { invert(X, inverse); }

COACHHOOK_CLONES void invert_upper(const float* X, float* inverse) { invert(X, inverse); }

}  // namespace coachhook
