#include "panel_rotations.h"

#include <ATen/ATen.h>

#include "small_matrices.h"

namespace coachhook {
namespace {

constexpr int kPasses = 2;
// What a basis may deviate from orthonormal before the last pass, which squares it.
constexpr double kDeviation = 1e-7;

at::Tensor eye_like(const at::Tensor& x) { return at::eye(x.size(-1), x.options()); }

// Half the diagonal and what is above it (below it): E + E^T is all of a symmetric matrix.
at::Tensor half(int64_t size, bool lower, const at::TensorOptions& options) {
  const at::Tensor ones = at::ones({size, size}, options);
  const at::Tensor strict = lower ? at::tril(ones, -1) : at::triu(ones, 1);
  strict.diagonal().fill_(0.5);
  return strict;
}

// One pass towards orthonormal columns: V <- V (I - E) with E + E^T = V^T V - I, which is `gram` on entry.
void polish(at::Tensor& V, at::Tensor gram, const at::Tensor& half) {
  V = at::baddbmm(V, V, gram.mul_(half), /*beta=*/1, /*alpha=*/-1);
}

at::Tensor small_enough(const at::Tensor& gram) { return gram.abs().max().lt(kDeviation); }

at::Tensor yes(const at::Tensor& x) { return at::ones({}, x.options().dtype(at::kBool)); }

}  // namespace

Rotations rotations(const at::Tensor& X, bool removes) {
  const int64_t panels = X.size(0), width = X.size(1), n = X.size(2), size = width + n;
  const at::Tensor Xt = X.transpose(1, 2);
  at::Tensor good = yes(X);
  const at::Tensor of_rows = at::baddbmm(eye_like(Xt).expand({panels, width, width}), X, Xt);
  const at::Tensor of_columns = at::baddbmm(eye_like(X).expand({panels, n, n}), Xt, X);
  const at::Tensor T = inverse_factors(of_rows, good);
  // R = F^T, or for a lower triangular R the factor of the matrix turned upside down
  at::Tensor R = removes ? inverse_factors(of_columns.flip({1, 2}), good).flip({1, 2})
                         : inverse_factors(of_columns, good);
  R = R.transpose(1, 2);
  at::Tensor Q = at::empty({panels, size, size}, X.options());
  Q.narrow(1, 0, width).narrow(2, 0, width).copy_(T.transpose(1, 2));
  Q.narrow(1, width, n).narrow(2, 0, width).copy_(at::bmm(T, X).transpose(1, 2));
  Q.narrow(1, 0, width).narrow(2, width, n).copy_(at::bmm(X, R).neg_());
  Q.narrow(1, width, n).narrow(2, width, n).copy_(R);
  const at::Tensor mask = at::zeros({size, size}, X.options());
  mask.narrow(0, 0, width).narrow(1, 0, width).copy_(half(width, false, X.options()));
  mask.narrow(0, width, n).narrow(1, width, n).copy_(half(n, removes, X.options()));
  for (int pass = 0; pass < kPasses; ++pass) {
    const at::Tensor gram =
        at::baddbmm(eye_like(Q).expand({panels, size, size}), Q.transpose(1, 2), Q, /*beta=*/-1);
    if (pass == kPasses - 1) good = good.logical_and(small_enough(gram));
    polish(Q, gram, mask);
  }
  at::Tensor left = Q.narrow(2, 0, width);
  if (removes) {  // A = A' left_top + K left_bottom, and [I X] Q = [left_top^-T 0]
    const at::Tensor bottom = left.narrow(1, width, n);
    const at::Tensor back =
        at::baddbmm(left.narrow(1, 0, width), X, bottom).tril_().transpose(1, 2);
    left = at::cat({back, at::bmm(bottom, back).neg_()}, 1);
  }
  return {Q, left, good};
}

Chain chain(const at::Tensor& Y, bool removes) {
  const int64_t panels = Y.size(0), width = Y.size(1), n = Y.size(2);
  const double sign = removes ? -1 : 1;
  at::Tensor good = yes(Y);
  const at::Tensor eye = eye_like(Y).expand({1, n, n});
  const at::Tensor sums = at::cumsum(at::bmm(Y.transpose(1, 2), Y), 0).mul_(sign).add_(eye);
  at::Tensor P = inverse_factors(sums, good).transpose(1, 2);
  if (!removes) {  // what is lost in a difference does not come back
    const at::Tensor all = Y.reshape({1, panels * width, n}).expand({panels, panels * width, n});
    const at::Tensor panel = at::arange(panels, Y.options().dtype(at::kLong));
    const at::Tensor before = panel.view({1, panels, 1}).le(panel.view({panels, 1, 1}));  // Y_i is part of P_j+1
    const at::Tensor upper = half(n, false, Y.options());
    for (int pass = 0; pass < kPasses; ++pass) {
      const at::Tensor Z = at::bmm(all, P);
      Z.view({panels, panels, width * n}).mul_(before);
      at::Tensor gram = at::baddbmm(eye.expand({panels, n, n}), P.transpose(1, 2), P, /*beta=*/-1);
      gram.baddbmm_(Z.transpose(1, 2), Z);
      if (pass == kPasses - 1) good = good.logical_and(small_enough(gram));
      polish(P, gram, upper);
    }
  }
  P = at::cat({eye, P});
  at::Tensor X = at::bmm(Y, P.narrow(0, 0, panels));
  if (removes) {
    const at::Tensor rest =
        at::baddbmm(at::eye(width, Y.options()).expand({panels, width, width}), X, X.transpose(1, 2), 1, -1);
    X = at::bmm(inverse_factors(rest, good), X);
  }
  return {X, P, good};
}

}  // namespace coachhook
