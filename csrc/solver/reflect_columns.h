// The reflectors of one block of kBlock columns (block_reflector.h), found one after the other, and a small
// inverse.
#pragma once

#include <cstdint>

namespace coachhook {

// D [kBlock, kBlock], rows ldd apart, is a block of the factor's diagonal, and Kt [n, kBlock] holds the keys
// of its rows, by columns. Adds the keys, or removes them; Kt holds the w's afterwards. False when a pivot is
// not positive.
bool reflect_columns(bool removes, double* D, int64_t ldd, double* Kt, int64_t n);
bool reflect_columns(bool removes, float* D, int64_t ldd, float* Kt, int64_t n);

// `inverse` of an upper triangular X [kBlock, kBlock] of nonzero diagonal.
void invert_upper(const double* X, double* inverse);
void invert_upper(const float* X, float* inverse);

}  // namespace coachhook
