// Products, norms and gathers over the rows (tokens) of a matrix on CPU, for the gated projection.
//
// Large products are oneDNN's (fp32) or ATen's; the few-token products of bf16 and fp16, where the bytes of
// the matrix are the cost, read it once and accumulate in fp32.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace coachhook {

// The dtype that sums of `type` are kept in.
inline at::ScalarType accumulator(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// x [n, d] in the accumulator's dtype times matrix^T, matrix [r, d] in any dtype: [n, r] in the accumulator's
// dtype.
at::Tensor project(const at::Tensor& x, const at::Tensor& matrix);

// norms[t] = ||c_t||, summed in double and in a fixed order. T is c's dtype: float or double.
template <typename T>
void row_norms(const at::Tensor& c, T* norms);

// Rows `index` (ascending) of a matrix; a view where they are consecutive.
at::Tensor gather(const at::Tensor& rows, const std::vector<int64_t>& index);

// out[tokens[i]] += y[i], rounded once.
void add_rows(const at::Tensor& out, const std::vector<int64_t>& tokens, const at::Tensor& y);

}  // namespace coachhook
