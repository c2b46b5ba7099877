#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

#include "cuda/image.h"

namespace coachhook {
namespace {

constexpr int kDevices = 64;

__global__ void any_kernel() {}

int asked() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, any_kernel) != cudaSuccess) {
    cudaGetLastError();  // it is no error: there is no code for this GPU
    return 0;
  }
  return attributes.ptxVersion;
}

}  // namespace

int compiled_for() {
  static std::array<std::atomic<int>, kDevices> known;  // one more than the answer; 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return asked();
  if (known[device] == 0) known[device] = asked() + 1;
  return known[device] - 1;
}

}  // namespace coachhook
