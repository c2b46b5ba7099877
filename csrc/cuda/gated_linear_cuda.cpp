#include "cuda/gated_linear_cuda.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

#include "cuda/arguments.h"
#include "cuda/decode.h"
#include "cuda/image.h"
#include "cuda/overlapped_base.h"
#include "cuda/with_triton.h"

namespace coachhook {
namespace {

// Elements of a weight below which the base ends before a second stream has begun.
constexpr int64_t kEnoughToOverlap = 1 << 22;

int attribute(cudaDeviceAttr which, c10::DeviceIndex device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

bool is_aligned(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Rows that the kernels can load 16 bytes at a time.
bool has_rows(const at::Tensor& t) {
  return t.dim() == 2 && t.stride(1) == 1 && t.stride(0) % 8 == 0 && t.size(1) % 8 == 0 && is_aligned(t);
}

// The sequences of the tokens, as reference.sequence_rows counts them.
int64_t sequences(const Arguments& a, int64_t tokens) {
  if (a.mask) return a.mask->dim() > 0 ? a.mask->size(0) : 0;
  if (a.x.dim() > 2) return tokens / std::max<int64_t>(a.x.size(-2), 1);
  return a.state ? a.state->size(0) : 1;
}

// Whether decode.cu takes the call. It says no to whatever is wrong, too: the Triton operator then says what
// is.
bool takes(const Arguments& a, int64_t m) {
  const at::ScalarType dtype = a.B.scalar_type();
  if (dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  const at::Device device = a.B.device();
  const auto same = [&](const at::Tensor& t) { return t.scalar_type() == dtype && t.device() == device; };
  const auto fits = [&](const OptionalTensor& t) { return !t || same(*t); };
  if (a.x.dim() < 1 || a.B.dim() != 2 || !same(a.x) || !fits(a.bias) || !fits(a.U) || !fits(a.sketch))
    return false;
  const int64_t d = a.B.size(1), r = a.B.size(0);
  if (d == 0 || r == 0 || a.x.size(-1) != d) return false;
  const int64_t tokens = a.x.numel() / d;
  if (tokens < 1 || tokens > kDecodeTokens) return false;
  if (!has_rows(a.B) || !a.B.is_contiguous()) return false;
  if (a.U ? a.U->dim() != 2 || a.U->size(0) != m || a.U->size(1) != r : r != m) return false;
  if (a.bias && (a.bias->dim() != 1 || a.bias->size(0) != m || !a.bias->is_contiguous())) return false;
  if (a.sketch && (!has_rows(*a.sketch) || a.sketch->size(0) == 0 || !a.sketch->is_contiguous() ||
                   a.sketch->size(1) != d))
    return false;
  if (a.threshold.dim() != 0 || a.threshold.scalar_type() != at::kFloat || a.threshold.device() != device)
    return false;
  if (a.mask &&
      (a.mask->scalar_type() != at::kBool || a.mask->numel() != tokens || a.mask->device() != device))
    return false;
  if (a.gate == "sequence") {
    if (a.cu_seqlens || sequences(a, tokens) != tokens) return false;
    if (a.state && (a.state->dim() != 2 || a.state->size(0) != tokens || a.state->size(1) != 3 ||
                    a.state->device() != device))
      return false;
  } else if (a.gate != "calibrated" && a.gate != "relative") {
    return false;
  }
  const c10::cuda::CUDAGuard guard(device);
  return compiled_for() >= 80;
}

// x W^T + b while `work` runs on the current stream, which goes on when both are done.
template <typename F>
at::Tensor overlapped_linear(const Arguments& a, const at::Tensor& weight, const F& work) {
  if (weight.numel() < kEnoughToOverlap) {
    work();
    return at::linear(a.x, weight, a.bias).contiguous();
  }
  OverlappedBase base(a.x.reshape({-1, a.x.size(-1)}), weight, a.bias);
  work();
  base.join();
  std::vector<int64_t> shape = a.x.sizes().vec();
  shape.back() = weight.size(0);
  return base.out().view(shape);
}

// `weight`: computed here, by our kernel or cuBLAS. `out` without it: the base's output, corrected in place.
Output decode(const Arguments& a, const at::Tensor* weight, at::Tensor out, int64_t m) {
  const c10::cuda::CUDAGuard guard(a.x.device());
  const int64_t d = a.B.size(1), tokens = a.x.numel() / d;
  at::Tensor x = a.x.reshape({tokens, d});
  if (!has_rows(x)) x = x.clone(at::MemoryFormat::Contiguous);
  const bool sequence = a.gate == "sequence";
  const at::Tensor mask = a.mask ? a.mask->contiguous() : at::Tensor();
  const at::Tensor before = a.state ? a.state->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor fire = at::empty(a.x.sizes().slice(0, a.x.dim() - 1), x.options().dtype(at::kBool));
  const at::Tensor after = at::empty({sequence ? tokens : 0, 3}, x.options().dtype(at::kFloat));
  const bool own_base = weight != nullptr && has_rows(*weight);

  Decode call = {};
  call.bf16 = a.B.scalar_type() == at::kBFloat16;
  call.tokens = static_cast<int>(tokens);
  call.m = static_cast<int>(m);
  call.r = static_cast<int>(a.B.size(0));
  call.d = static_cast<int>(d);
  call.x = x.const_data_ptr();
  call.x_row = x.stride(0);
  call.B = a.B.const_data_ptr();
  if (a.U) {
    call.U = a.U->const_data_ptr();
    call.u_row = a.U->stride(0);
    call.u_col = a.U->stride(1);
  }
  if (a.sketch && !sequence) {
    call.sketch = a.sketch->const_data_ptr();
    call.s = static_cast<int>(a.sketch->size(0));
  }
  call.threshold = a.threshold.const_data_ptr<float>();
  call.relative = a.gate == "relative";
  call.sequence = sequence;
  call.mask = a.mask ? mask.const_data_ptr<bool>() : nullptr;
  call.before = a.state && sequence ? before.const_data_ptr<float>() : nullptr;
  call.fire = fire.mutable_data_ptr<bool>();
  call.after = after.mutable_data_ptr<float>();
  const at::Tensor workspace = at::empty({decode_workspace(call)}, after.options());
  call.workspace = workspace.mutable_data_ptr<float>();

  const c10::DeviceIndex index = x.device().index();
  const Device device = {attribute(cudaDevAttrMultiProcessorCount, index), compiled_for() >= 90,
                         c10::cuda::getCurrentCUDAStream()};
  const auto delta = [&] { C10_CUDA_CHECK(launch_delta(call, device)); };
  if (own_base) {
    delta();
    std::vector<int64_t> shape = a.x.sizes().vec();
    shape.back() = m;
    out = at::empty(shape, x.options());
    call.weight = weight->const_data_ptr();
    call.w_row = weight->stride(0);
    call.bias = a.bias ? a.bias->const_data_ptr() : nullptr;
  } else if (weight != nullptr) {
    out = overlapped_linear(a, *weight, delta);
  } else {
    delta();
  }
  call.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(launch_finish(call, device));
  return {out, fire, after};
}

}  // namespace

Output gated_delta_cuda(const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U,
                        const at::Tensor& B, const at::Tensor& threshold, const OptionalTensor& sketch,
                        std::string_view gate, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                        const OptionalTensor& state) {
  const Arguments a{x, std::nullopt, U, B, threshold, sketch, gate, mask, cu_seqlens, state};
  const int64_t m = U ? U->size(0) : B.size(0);
  if (takes(a, m) && out.scalar_type() == B.scalar_type() && out.device() == B.device() &&
      out.sizes().slice(0, out.dim() - 1) == x.sizes().slice(0, x.dim() - 1) && out.size(-1) == m) {
    return decode(a, nullptr, out.clone(at::MemoryFormat::Contiguous), m);
  }
  static const auto triton = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("coachhook::gated_delta_triton", "")
                                 .typed<decltype(gated_delta_cuda)>();
  return with_triton(a, nullptr, &out, [&] {
    return triton.call(out, x, U, B, threshold, sketch, gate, mask, cu_seqlens, state);
  });
}

Output gated_linear_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& U, const at::Tensor& B, const at::Tensor& threshold,
                         const OptionalTensor& sketch, std::string_view gate, const OptionalTensor& mask,
                         const OptionalTensor& cu_seqlens, const OptionalTensor& state) {
  const Arguments a{x, bias, U, B, threshold, sketch, gate, mask, cu_seqlens, state};
  if (weight.dim() == 2 && weight.scalar_type() == B.scalar_type() && weight.device() == B.device() &&
      B.dim() == 2 && weight.size(1) == B.size(1) && takes(a, weight.size(0))) {
    return decode(a, &weight, at::Tensor(), weight.size(0));
  }
  static const auto triton = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("coachhook::gated_linear_triton", "")
                                 .typed<decltype(gated_linear_cuda)>();
  return with_triton(a, &weight, nullptr, [&] {
    return triton.call(x, weight, bias, U, B, threshold, sketch, gate, mask, cu_seqlens, state);
  });
}

}  // namespace coachhook
