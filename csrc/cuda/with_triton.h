// What decode.cu does not take: Triton's kernels, launched by Python the first time and from here after that.
#pragma once

#include <functional>

#include "cuda/arguments.h"

namespace coachhook {

// `triton`: Python's operator for this call. `weight`: the base is its product. `base` without it: its
// output, which is not changed.
Output with_triton(const Arguments& a, const at::Tensor* weight, const at::Tensor* base,
                   const std::function<Output()>& triton);

bool is_capturing();

}  // namespace coachhook
