#include "cuda/overlapped_base.h"

#include <c10/cuda/CUDAGuard.h>

#include <mutex>
#include <unordered_map>

namespace coachhook {
namespace {

// The side stream of a stream: first in line for multiprocessors. One each, since cuBLAS keeps a workspace
// for each.
c10::cuda::CUDAStream side_of(const c10::cuda::CUDAStream& stream) {
  static std::mutex mutex;
  static std::unordered_map<c10::cuda::CUDAStream, c10::cuda::CUDAStream> sides;
  const std::lock_guard lock(mutex);
  const auto found = sides.find(stream);
  if (found != sides.end()) return found->second;
  const auto side = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, stream.device_index());
  return sides.emplace(stream, side).first->second;
}

}  // namespace

OverlappedBase::OverlappedBase(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias)
    : current_(c10::cuda::getCurrentCUDAStream()),
      // All memory is the current stream's, so that nothing is given away while the side stream still writes
      // it.
      out_(at::empty({x.size(0), weight.size(0)}, x.options())) {
  const c10::cuda::CUDAStream side = side_of(current_);
  c10::Event begin(c10::DeviceType::CUDA);
  begin.record(current_);
  begin.block(side);
  const c10::cuda::CUDAStreamGuard guard(side);
  if (bias) {
    at::addmm_out(out_, *bias, x, weight.t());
  } else {
    at::mm_out(out_, x, weight.t());
  }
  end_.record(side);
}

void OverlappedBase::join() {
  if (!is_joined_) end_.block(current_);
  is_joined_ = true;
}

}  // namespace coachhook
