// The rotations that add or remove keys, for one panel of columns: plain memory, no torch.
//
// Adding keys is a sequence of reflectors, one a column c: G_c = (I - tau v v^T) diag(-1 at c), v = [e_c;
// w_c], which maps the row [L_cc, K_c] to [L'_cc, 0]. With W the w's of a block (one a row) and U = striu(W
// W^T) + diag(1 + |w|^2) / 2, the product over the block acts on the rows [A K] below as
//     M = (A + K W^T) N,   A <- M - A,   K <- K - M W,   N = U^-1.
// Going back (undo) is the transpose: N = U^-T and -W for W. Removing keys solves the same relation for the
// other side, M = (A - K W^T) N with N = (I - U)^-1: the hyperbolic transformation in its mixed, relationally
// stable form.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "solver/packed_factor.h"
#include "solver/reflect_rows.h"

namespace coachhook {

// Rows that go through a panel together: a multiple of every tile height of micro_gemm.
constexpr int64_t kRowGroup = 24;

enum class Mode { kUpdate, kUndo, kDowndate };

// The block reflectors of a panel, ready to be applied.
template <typename T>
struct PanelReflectors {
  PanelReflectors(int64_t width, int64_t n, int64_t ld);

  // Block `index` from its w's, one a column of Wt [n, kBlock].
  void set(int64_t index, Mode mode, const T* Wt);
  BlockReflectors<T> from(int64_t index) const;
  // All blocks in the order that the mode asks for, on rows of [A K]: A [rows, *] over the panel's columns, K
  // [rows, ld].
  void apply_all(Mode mode, T* A, int64_t row_stride, T* K, int64_t rows) const;
  // The same where A is stored by columns, A(r, c) = A[c * ld_a + r]; to add or to remove keys.
  void apply_columns(T* A, int64_t ld_a, T* K, int64_t rows) const;

  int64_t blocks, n, ld;
  std::vector<T> N;  // [blocks, kBlock, kBlock]
  std::vector<T> R;  // [blocks, n, kBlock]     = +-W^T N
  std::vector<T> S;  // [blocks, kBlock, ld]    = +-W
};

void unpack_triangle(const auto* packed, auto* D, int64_t width, int64_t padded) {
  std::fill_n(D, padded * padded, 0);
  for (int64_t r = 0; r < width; ++r) std::copy_n(packed + packed_size(r), r + 1, D + r * padded);
  for (int64_t r = width; r < padded; ++r) D[r * padded + r] = 1;
}

void pack_triangle(const auto* D, auto* packed, int64_t width, int64_t padded) {
  for (int64_t r = 0; r < width; ++r) std::copy_n(D + r * padded, r + 1, packed + packed_size(r));
}

// Transforms a panel's own triangle D [padded, padded] and keys K [padded, ld], and fills `reflectors`.
// Afterwards K holds W (kUpdate, kDowndate) or, from W, the keys again (kUndo). False when a downdate meets a
// pivot that is not positive.
template <typename T>
bool transform_panel(Mode mode, T* D, int64_t padded, T* K, PanelReflectors<T>& reflectors);

// K [padded, ld] <- D^-1 K, and <- D^-T K.
template <typename T>
void solve_lower(const T* D, int64_t padded, T* K, int64_t ld);
template <typename T>
void solve_lower_transposed(const T* D, int64_t padded, T* K, int64_t ld);

}  // namespace coachhook
