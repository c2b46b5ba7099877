// The rotations of block_reflector.h where a batch has very few keys: column after column instead of blocks
// of 16.
//
// A block of b columns costs 4 n + 2 b flops an entry of L; for one key nearly all of them go into the b x b
// matrix. Column by column it is 4 n + 2, in a recurrence that no row can hurry, so a vector holds one column
// of several rows:
//     a' = alpha a + beta k,   k <- k - (a + a') w
// for every entry a of a row and its keys k. To add keys alpha = tau - 1 and beta = tau w; to remove them
// alpha = 1 / (tau - 1) and beta = -tau alpha w, the mixed form again; tau = 2 / (1 + |w|^2) in both.
// A column waits for the last one's keys, so for one key the same is k <- gamma k - delta a, one product from
// key to key: gamma = 1 - beta w, delta = (1 + alpha) w. For several keys that is no shorter, and removing
// them loses digits where a' itself is not used (docs/experiments/solver-choices.md).
#pragma once

#include <cstdint>
#include <vector>

#include "solver/block_reflector.h"

namespace coachhook {

// As many keys as stay in registers beside two squares of a factor; at 4 the recurrence is well ahead of the
// blocks (docs/experiments/solver-choices.md).
constexpr int64_t kNarrowKeys = 4;

// One panel's columns.
template <typename T>
struct NarrowReflectors {
  NarrowReflectors(int64_t width, int64_t n)
      : n(n), alpha(width), gamma(width), delta(width), beta(width * n), w(width * n) {}

  // Transforms the panel's packed triangle of `width` rows and their keys K [width, ld], and fills the
  // columns. Afterwards K holds the w's. False when a downdate meets a pivot that is not positive.
  bool transform_triangle(Mode mode, T* packed, int64_t width, T* K, int64_t ld);
  // One row over the columns first .. end - 1: A(c) = A[c * stride], its keys k [n].
  void apply_row(T* A, int64_t stride, int64_t first, int64_t end, T* k) const;
  // Rows A [rows, kPanel] with K [rows, ld].
  void apply_rows(T* A, T* K, int64_t ld, int64_t rows) const;

  int64_t n;
  std::vector<T> alpha, gamma, delta;  // [width]; the last two are for one key
  std::vector<T> beta, w;              // [width, n]

 private:
  template <int N>
  void apply_row_of(T* A, int64_t stride, int64_t first, int64_t end, T* k) const;
};

// x [width, ld] <- D^-T x for the packed triangle D, first n columns.
template <typename T>
void solve_packed_transposed(const T* packed, int64_t width, T* x, int64_t ld, int64_t n);

// out [kPanel, ld] -= rows^T x for rows [count, kPanel] and x [count, ld], first n columns.
template <typename T>
void subtract_rows(const T* rows, int64_t count, const T* x, T* out, int64_t ld, int64_t n);

}  // namespace coachhook
