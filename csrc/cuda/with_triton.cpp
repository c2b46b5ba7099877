#include "cuda/with_triton.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include "cuda/overlapped_base.h"
#include "cuda/replay.h"

namespace coachhook {
namespace {

std::byte* address(const OptionalTensor& tensor) {
  // Tensors that kernels only read come as constants; the launch is what says which are written.
  return tensor ? static_cast<std::byte*>(const_cast<void*>(tensor->const_data_ptr())) : nullptr;
}

Output replay(const Plan& plan, const Arguments& a, const at::Tensor* weight, const at::Tensor* base) {
  const at::Tensor rows = a.x.reshape({-1, a.x.size(-1)});
  const at::Tensor fire = at::empty(a.x.sizes().slice(0, a.x.dim() - 1), a.x.options().dtype(at::kBool));
  const at::Tensor after = at::empty({plan.after_rows, 3}, a.x.options().dtype(at::kFloat));
  const at::Tensor scratch = at::empty({plan.scratch_bytes}, a.x.options().dtype(at::kByte));
  std::optional<OverlappedBase> overlapped;
  at::Tensor out;
  if (weight == nullptr) {
    out = base->clone(at::MemoryFormat::Contiguous);
  } else if (plan.is_overlapped) {
    out = overlapped.emplace(rows, *weight, a.bias).out();
  } else {
    out = at::linear(rows, *weight, a.bias);
  }
  Addresses addresses;
  addresses[kX] = address(rows);
  addresses[kOut] = address(out);
  addresses[kU] = address(a.U);
  addresses[kB] = address(a.B);
  addresses[kThreshold] = address(a.threshold);
  addresses[kSketch] = address(a.sketch);
  addresses[kMask] = address(a.mask);
  addresses[kCuSeqlens] = address(a.cu_seqlens);
  addresses[kState] = address(a.state);
  addresses[kFire] = address(fire);
  addresses[kAfter] = address(after);
  addresses[kScratch] = address(scratch);
  for (const Launch& launch : plan.launches) {
    if (overlapped && touches(launch, kOut)) overlapped->join();
    run(launch, addresses);
  }
  if (overlapped) overlapped->join();
  std::vector<int64_t> shape = a.x.sizes().vec();
  shape.back() = out.size(-1);
  return {out.view(shape), fire, after};
}

}  // namespace

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

Output with_triton(const Arguments& a, const at::Tensor* weight, const at::Tensor* base,
                   const std::function<Output()>& triton) {
  if (!a.x.is_cuda()) return triton();  // it says what is wrong
  const c10::cuda::CUDAGuard guard(a.x.device());
  if (is_capturing()) return triton();  // the host's time does not count there
  Kind kind = {weight != nullptr, a.gate == "relative", a.gate == "sequence"};
  describe(kind, a.x);
  describe(kind, weight != nullptr ? *weight : *base);
  describe(kind, a.B);
  describe(kind, a.threshold);
  for (const OptionalTensor* tensor : {&a.bias, &a.U, &a.sketch, &a.mask, &a.cu_seqlens, &a.state})
    describe(kind, *tensor);
  const auto plan = plan_of(kind);
  if (!plan) {
    Awaiting awaiting(std::move(kind));
    Output result = triton();
    awaiting.succeeded();
    return result;
  }
  return *plan == nullptr ? triton() : replay(**plan, a, weight, base);
}

}  // namespace coachhook
