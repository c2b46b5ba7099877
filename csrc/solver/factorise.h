// The packed factor made anew in O(d^3), over ATen's products on any device.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace coachhook {

// The packed symmetric C becomes its factor, panel by panel (left-looking). Returns 0, or the order of a
// minor that is not positive.
int64_t factor_in_place(at::Tensor C, int64_t d);

// L <- the packed L L^T + K K^T, panels from the last to the first: a panel needs only itself and those to
// its left.
void multiply_in_place(at::Tensor L, const at::Tensor& K, int64_t d);

}  // namespace coachhook
