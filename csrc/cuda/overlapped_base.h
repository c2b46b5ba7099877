// The base projection on a stream of its own.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

namespace coachhook {

class OverlappedBase {
 public:
  // Begins x W^T + b after what the current stream has done so far. x [tokens, d], W [m, d].
  OverlappedBase(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
  // What the side stream still writes must not be given away.
  ~OverlappedBase() { join(); }
  OverlappedBase(const OverlappedBase&) = delete;
  OverlappedBase& operator=(const OverlappedBase&) = delete;

  // [tokens, m]; not to be touched before `join`.
  const at::Tensor& out() const { return out_; }
  // What the current stream does from now on comes after the base.
  void join();

 private:
  c10::cuda::CUDAStream current_;
  c10::Event end_{c10::DeviceType::CUDA};
  at::Tensor out_;
  bool is_joined_ = false;
};

}  // namespace coachhook
