#include "solver/factorise.h"

#include "solver/cholesky.h"
#include "solver/packed_factor.h"

namespace coachhook {
namespace {

at::Tensor rows_of(const at::Tensor& packed, const Panel& p,
                   int64_t row) {  // rows `row`.. of a panel's block, [*, width]
  const int64_t skip = row - p.first - p.width;
  return packed.narrow(0, p.rect + skip * p.width, (p.below - skip) * p.width)
      .view({p.below - skip, p.width});
}

template <typename F>
void with_triangle(at::Tensor packed, const Panel& p,
                   const F& change) {  // D [width, width] -> its new lower triangle
  at::Tensor part = packed.narrow(0, p.triangle, packed_size(p.width));
  const at::Tensor index = at::tril_indices(p.width, p.width, 0, part.options().dtype(at::kLong));
  const at::Tensor flat = index[0] * p.width + index[1];
  const at::Tensor D =
      at::zeros({p.width * p.width}, part.options()).index_copy_(0, flat, part).view({p.width, p.width});
  part.copy_(change(D).reshape(-1).index_select(0, flat));
}

}  // namespace

int64_t factor_in_place(at::Tensor C, int64_t d) {
  for (int64_t i = 0; i < Panel::count(d); ++i) {
    stop_if_interrupted();
    const Panel p(d, i);
    int64_t bad = 0;
    with_triangle(C, p, [&](at::Tensor D) {
      for (int64_t j = 0; j < i; ++j) {
        const at::Tensor rows = rows_of(C, Panel(d, j), p.first);
        const at::Tensor head = rows.narrow(0, 0, p.width);
        D.addmm_(head, head.t(), 1, -1);
        if (p.below > 0)
          rows_of(C, p, p.first + p.width).addmm_(rows.narrow(0, p.width, p.below), head.t(), 1, -1);
      }
      auto [factor, info] = at::linalg_cholesky_ex(D);
      bad = info.item<int64_t>();
      if (bad == 0 && p.below > 0) {
        at::Tensor below = rows_of(C, p, p.first + p.width);
        below.copy_(at::linalg_solve_triangular(factor.t(), below, /*upper=*/true, /*left=*/false));
      }
      return factor;
    });
    if (bad != 0) return p.first + bad;
  }
  return 0;
}

void multiply_in_place(at::Tensor L, const at::Tensor& K, int64_t d) {
  for (int64_t i = Panel::count(d) - 1; i >= 0; --i) {
    stop_if_interrupted();
    const Panel p(d, i);
    const at::Tensor k = K.narrow(0, p.first, p.width);
    at::Tensor below = p.below > 0 ? rows_of(L, p, p.first + p.width) : at::Tensor();
    with_triangle(L, p, [&](const at::Tensor& D) {
      at::Tensor product = at::mm(D, D.t()).addmm_(k, k.t());
      if (p.below > 0) {
        below.copy_(at::mm(below, D.t()));
        below.addmm_(K.narrow(0, p.first + p.width, p.below), k.t());
      }
      for (int64_t j = 0; j < i; ++j) {
        const at::Tensor rows = rows_of(L, Panel(d, j), p.first);
        const at::Tensor head = rows.narrow(0, 0, p.width);
        product.addmm_(head, head.t());
        if (p.below > 0) below.addmm_(rows.narrow(0, p.width, p.below), head.t());
      }
      return product;
    });
  }
}

}  // namespace coachhook
