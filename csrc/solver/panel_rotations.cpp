#include "solver/panel_rotations.h"

#include <ATen/ATen.h>

#include "solver/small_matrices.h"

namespace coachhook {
namespace {

constexpr int kPasses = 2;
// What a basis may deviate from orthonormal before the last pass, which squares it.
constexpr double kDeviation = 1e-7;

at::Tensor plus_identity(const at::Tensor& x, double times) {
  x.diagonal(0, -2, -1).add_(times);
  return x;
}

// Half the diagonal and what is above it: E + E^T is all of a symmetric matrix.
at::Tensor upper_half(int64_t size, const at::TensorOptions& options) {
  const at::Tensor half = at::ones({size, size}, options).triu_();
  half.diagonal().fill_(0.5);
  return half;
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
  const at::Tensor of_rows = plus_identity(at::bmm(X, Xt), 1);
  const at::Tensor of_columns = plus_identity(at::bmm(Xt, X), 1);
  const at::Tensor T = inverse_factors(of_rows, good);  // T and R are the inverses here
  // a factor's transpose, or for a lower triangle the factor of the matrix turned upside down
  at::Tensor R = removes ? inverse_factors(of_columns.flip({1, 2}), good).flip({1, 2})
                         : inverse_factors(of_columns, good);
  R = R.transpose(1, 2);
  at::Tensor Q = at::empty({panels, size, size}, X.options());
  Q.narrow(1, 0, width).narrow(2, 0, width).copy_(T.transpose(1, 2));
  Q.narrow(1, width, n).narrow(2, 0, width).copy_(at::bmm(T, X).transpose(1, 2));
  Q.narrow(1, 0, width).narrow(2, width, n).copy_(at::bmm(X, R).neg_());
  Q.narrow(1, width, n).narrow(2, width, n).copy_(R);
  const at::Tensor mask = upper_half(size, X.options());  // the two bases need nothing from each other
  mask.narrow(0, 0, width).narrow(1, width, n).zero_();
  if (removes) mask.narrow(0, width, n).narrow(1, width, n).copy_(upper_half(n, X.options()).t());
  for (int pass = 0; pass < kPasses; ++pass) {
    const at::Tensor gram = plus_identity(at::bmm(Q.transpose(1, 2), Q), -1);
    if (pass == kPasses - 1) good = good.logical_and(small_enough(gram));
    polish(Q, gram, mask);
  }
  at::Tensor left = Q.narrow(2, 0, width);
  if (removes) {  // A = A' left_top + K left_bottom, and [I X] Q = [left_top^-T 0]
    const at::Tensor bottom = left.narrow(1, width, n);
    const at::Tensor back = at::baddbmm(left.narrow(1, 0, width), X, bottom).tril_().transpose(1, 2);
    left = at::cat({back, at::bmm(bottom, back).neg_()}, 1);
  }
  return {Q, left, good};
}

Chain chain(const at::Tensor& Y, bool removes) {
  const int64_t panels = Y.size(0), width = Y.size(1), n = Y.size(2);
  at::Tensor good = yes(Y);
  at::Tensor sums = at::cumsum(at::bmm(Y.transpose(1, 2), Y), 0);
  if (removes) sums.neg_();
  plus_identity(sums, 1);
  at::Tensor P = inverse_factors(sums, good).transpose(1, 2);
  if (!removes) {  // what is lost in a difference does not come back
    const at::Tensor all = Y.reshape({1, panels * width, n}).expand({panels, panels * width, n});
    const at::Tensor panel = at::arange(panels, Y.options().dtype(at::kLong));
    // Y_i is part of what P_i+1 and those after it come from
    const at::Tensor before = panel.view({1, panels, 1}).le(panel.view({panels, 1, 1}));
    const at::Tensor upper = upper_half(n, Y.options());
    for (int pass = 0; pass < kPasses; ++pass) {
      const at::Tensor Z = at::bmm(all, P);
      Z.view({panels, panels, width * n}).mul_(before);
      const at::Tensor gram = at::bmm(P.transpose(1, 2), P).baddbmm_(Z.transpose(1, 2), Z);
      plus_identity(gram, -1);
      if (pass == kPasses - 1) good = good.logical_and(small_enough(gram));
      polish(P, gram, upper);
    }
  }
  P = at::cat({at::eye(n, Y.options()).unsqueeze(0), P});
  at::Tensor X = at::bmm(Y, P.narrow(0, 0, panels));
  if (removes) {
    const at::Tensor rest = plus_identity(at::bmm(X, X.transpose(1, 2)).neg_(), 1);
    X = at::bmm(inverse_factors(rest, good), X);
  }
  return {X, P, good};
}

}  // namespace coachhook
