// The key memory's factor: solve with it, add keys to it, remove keys from it, in O(d^2 n). docs/method.md
// section 4.
//
// L is packed (packed_factor.h), [*, d (d + 1) / 2], fp64 or fp32, contiguous, the lower Cholesky factor of C
// for each leading index; K is [*, d, n] of the same type and device. CPU tensors run the blocked kernels of
// block_reflector.cpp, all others a sweep over ATen products with groups of panels transformed together
// (sweep_portable.cpp).
//
// Every function checks its arguments before it writes, and a call that fails or is interrupted leaves L as
// it was: bit for bit if it had not begun to write, otherwise (an interrupt between panels) to rounding, by
// the transposed rotations.
#pragma once

#include <ATen/core/Tensor.h>

#include <exception>
#include <tuple>

namespace coachhook {

// C, a packed symmetric matrix [*, d (d + 1) / 2], to its packed factor. Refuses a matrix that is not
// positive definite.
at::Tensor chol_factor(const at::Tensor& C);

// X = (C + K K^T)^-1 K [*, d, n] and s = diag(K^T C^-1 K) [*, n]; L is not changed.
std::tuple<at::Tensor, at::Tensor> chol_solve(const at::Tensor& L, const at::Tensor& K);

// C <- C + K K^T.
void chol_update(at::Tensor& L, const at::Tensor& K);

// chol_solve and chol_update in one sweep over L and one back substitution: L'^-1 K falls out of the
// rotations.
std::tuple<at::Tensor, at::Tensor> chol_solve_update(at::Tensor& L, const at::Tensor& K);

// C <- C - K K^T, or an error if that is not positive definite.
void chol_downdate(at::Tensor& L, const at::Tensor& K);

// Called between panels on the calling thread; a non-null result stops the call, is thrown after L has been
// restored.
using InterruptCheck = std::exception_ptr (*)();
void set_interrupt_check(InterruptCheck check);
void stop_if_interrupted();

// Run the ATen sweep on CPU tensors too (tests of the path that other devices take).
void set_portable(bool portable);

}  // namespace coachhook
