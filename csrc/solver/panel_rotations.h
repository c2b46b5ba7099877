// The transformations that add or remove keys, for several panels at once: a few ATen calls in fp64 whatever
// the number of panels, and no synchronisation.
//
// With D a panel's triangle, W the keys that have reached it and X = D^-1 W, the matrix
//     Q = [T^-T, -X R^-1; X^T T^-T, R^-1],   T T^T = I + X X^T,   R^T R = I + X^T X
// is orthogonal and takes [D W] to [D' 0] with D' = D T, and the rows below, [A K], to [A' K']. It needs X
// only, and the X of all panels follow from Y = L^-1 K: X_j = Y_j P_j, where P_j is what the panels before
// make of an identity below K: P_j = F_j^-T with F_j F_j^T = I + sum_{i<j} Y_i^T Y_i.
// To remove keys, F_j F_j^T = I - sum and Q is that of X' = T^-1 X, T T^T = I - X X^T, which would add them
// again: A' comes from A = [A' K] Q's left columns, and K' from A' and K (the mixed form, which is as stable
// as the problem). R is lower triangular there, the inverse transpose of what I - X^T X has.
//
// A Cholesky factorisation of I + X^T X loses the digits that X^T X has more than I, so each basis is made
// orthonormal again afterwards (`polish`): the first factorisation only has to be good to a few digits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "solver/packed_factor.h"

namespace coachhook {

struct Rotations {
  at::Tensor Q;     // [panels, kPanel + n, kPanel + n]
  at::Tensor left;  // [panels, kPanel + n, kPanel]: A' = [A K] left; Q's own columns when keys are added
  at::Tensor good;  // bool [], on the device: false where the keys are too strong for what is above
};

// From X [panels, kPanel, n], fp64; X' when keys are removed.
Rotations rotations(const at::Tensor& X, bool removes);

struct Chain {
  at::Tensor X;     // [panels, kPanel, n]; X' when keys are removed
  at::Tensor P;     // [panels + 1, n, n]
  at::Tensor good;  // as above
};

// From Y [panels, kPanel, n], fp64.
Chain chain(const at::Tensor& Y, bool removes);

}  // namespace coachhook
