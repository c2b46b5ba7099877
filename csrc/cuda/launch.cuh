// Launches that may start early, and of clusters.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace coachhook {
namespace {

struct Grid {
  int blocks, threads, shared_bytes;
  int cluster;        // blocks of one
  bool early = true;  // it may start beside the kernel before it (and waits for that by itself)
  int rows = 1;       // of blocks
};

template <typename... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), const Grid& grid, const Device& device,
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks, grid.rows);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = device.stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (device.is_hopper && grid.early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = grid.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
}  // namespace coachhook
