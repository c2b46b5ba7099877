// Where a launch goes.
#pragma once

#include <cuda_runtime_api.h>

namespace coachhook {

struct Device {
  int processors;
  bool is_hopper;  // code for it, or later: programmatic dependent launch, clusters
  cudaStream_t stream;
};

}  // namespace coachhook
