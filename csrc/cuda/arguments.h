// The arguments of gated_linear and gated_delta, but for what says where the base's output comes from.
#pragma once

#include <string_view>

#include "gated_linear/gated_linear.h"

namespace coachhook {

using Output = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // out, fire, state

struct Arguments {
  const at::Tensor& x;
  const OptionalTensor &bias, &U;
  const at::Tensor &B, &threshold;
  const OptionalTensor& sketch;
  std::string_view gate;
  const OptionalTensor &mask, &cu_seqlens, &state;
};

}  // namespace coachhook
