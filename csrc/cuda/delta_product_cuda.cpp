#include "cuda/delta_product_cuda.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/delta_product.h"

namespace coachhook {
namespace {

void check_rows(const at::Tensor& t, const char* name) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  TORCH_CHECK_VALUE(
      t.dim() == 2 && t.stride(1) == 1 && t.stride(0) % 8 == 0 && t.stride(0) >= t.size(1) &&
          t.size(1) % 8 == 0 && is_aligned,
      name,
      " must be [rows, d] whose rows begin on 16 bytes and do not overlap, with d a multiple of 8, got ",
      t.sizes(), " with strides ", t.strides());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> delta_product_cuda(const at::Tensor& x, const at::Tensor& p,
                                                                  int64_t block, int64_t slices,
                                                                  bool want_length) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                   "x must be bf16 or fp16, got ", x.scalar_type());
  TORCH_CHECK_TYPE(p.scalar_type() == x.scalar_type(), "p must be ", x.scalar_type(), " as x is, got ",
                   p.scalar_type());
  check_rows(x, "x");
  check_rows(p, "p");
  TORCH_CHECK_VALUE(p.size(1) == x.size(1) && p.device() == x.device(), "p must be [r, ", x.size(1), "] on ",
                    x.device(), ", got ", p.sizes(), " on ", p.device());
  TORCH_CHECK_VALUE(block == 128 || block == 256, "block must be 128 or 256, got ", block);
  TORCH_CHECK_VALUE(slices >= 1, "slices must be positive, got ", slices);
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK(has_delta_product(), "delta_product is compiled for compute capability 9.0 alone");
  const int64_t tokens = x.size(0), r = p.size(0), c_row = (r + 15) / 16 * 16;
  const at::Tensor values = at::empty({slices * tokens, c_row}, x.options().dtype(at::kFloat));
  const at::Tensor lengths = at::empty({want_length ? slices : 0, tokens}, values.options());
  const at::Tensor counts = at::empty({2}, x.options().dtype(at::kInt));
  if (tokens == 0 || r == 0 || x.size(1) == 0) return {values.zero_(), lengths.zero_(), counts.zero_()};

  DeltaProduct call = {};
  call.bf16 = x.scalar_type() == at::kBFloat16;
  call.tokens = static_cast<int>(tokens);
  call.r = static_cast<int>(r);
  call.d = static_cast<int>(x.size(1));
  call.slices = static_cast<int>(slices);
  call.block = static_cast<int>(block);
  call.x = x.const_data_ptr();
  call.x_row = x.stride(0);
  call.p = p.const_data_ptr();
  call.p_row = p.stride(0);
  call.values = values.mutable_data_ptr<float>();
  call.c_row = static_cast<int>(c_row);
  call.lengths = want_length ? lengths.mutable_data_ptr<float>() : nullptr;
  call.counts = counts.mutable_data_ptr<int>();
  C10_CUDA_CHECK(launch_delta_product(call, c10::cuda::getCurrentCUDAStream()));
  return {values, lengths, counts};
}

}  // namespace coachhook
