#include "solver/small_matrices.h"

#include <ATen/ATen.h>

#ifdef COACHHOOK_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/image.h"
#include "cuda/small_cholesky.h"
#endif

namespace coachhook {
namespace {

struct Inverses {
  at::Tensor values, good;  // [count, size, size], and a bool []
};

#ifdef COACHHOOK_CUDA
bool fits_kernel(const at::Tensor& matrices) {
  return matrices.is_cuda() && matrices.size(-1) <= kSmallMatrix && compiled_for() >= 80;
}

Inverses launch(const at::Tensor& matrices, bool factored) {
  const at::Tensor values = at::empty_like(matrices);
  const at::Tensor good = at::empty({matrices.size(0)}, matrices.options().dtype(at::kBool));
  C10_CUDA_CHECK(launch_small_inverse(matrices.const_data_ptr<double>(), values.data_ptr<double>(),
                                      good.data_ptr<bool>(), static_cast<int>(matrices.size(0)),
                                      static_cast<int>(matrices.size(-1)), factored,
                                      c10::cuda::getCurrentCUDAStream()));
  return {values, good.all()};
}
#endif

at::Tensor solved(const at::Tensor& triangles) {
  const at::Tensor eye = at::eye(triangles.size(-1), triangles.options()).expand_as(triangles);
  return at::linalg_solve_triangular(triangles, eye, /*upper=*/false);
}

Inverses of_factors(const at::Tensor& matrices) {
#ifdef COACHHOOK_CUDA
  if (fits_kernel(matrices)) return launch(matrices, /*factored=*/false);
#endif
  const auto [factor, info] = at::linalg_cholesky_ex(matrices);
  return {solved(factor), info.eq(0).all()};
}

}  // namespace

at::Tensor inverse_factors(const at::Tensor& matrices, at::Tensor& good) {
  const Inverses found = of_factors(matrices.contiguous());
  good = good.logical_and(found.good);
  return found.values;
}

at::Tensor invert_lower(const at::Tensor& triangles) {
  const at::Tensor wide = triangles.to(at::kDouble).contiguous();
#ifdef COACHHOOK_CUDA
  if (fits_kernel(wide)) return launch(wide, /*factored=*/true).values.to(triangles.scalar_type());
#endif
  return solved(wide).to(triangles.scalar_type());
}

}  // namespace coachhook
