// The CUDA key of gated_linear and gated_delta: few tokens go to decode.cu, all else to the Triton operators
// that coachhook_fast/ops/gated_linear_cuda.py registers under the names with "_triton".
#pragma once

#include "gated_linear/gated_linear.h"

namespace coachhook {

decltype(gated_delta) gated_delta_cuda;
decltype(gated_linear) gated_linear_cuda;

}  // namespace coachhook
