// The panel steps of any other device: the panel's triangle is transformed on the host (a few hundred KB a
// panel), the rows below it by ATen's products on the device, with one block reflector for the whole panel.
#include <ATen/ATen.h>

#include <vector>

#include "factor_sweep.h"

namespace coachhook {
namespace {

template <typename T>
class PortableSweep final : public FactorSweep {
 public:
  explicit PortableSweep(const SweepBuffers& buffers) : b_(buffers) {}

  bool rotate(Mode mode, int64_t index) override {
    const Panel p(b_.d, index);
    at::Tensor W = b_.keys.narrow(0, p.first, p.padded);
    at::Tensor host_w = W.to(at::kCPU, /*non_blocking=*/false, /*copy=*/true).contiguous();
    at::Tensor D = triangle(p);
    PanelReflectors<T> reflectors(p.padded, b_.n, b_.ld);
    if (!transform_panel(mode, D.data_ptr<T>(), p.padded, host_w.data_ptr<T>(), reflectors)) return false;
    const at::Tensor packed = pack(p, D).to(W.device());
    const at::Tensor w = mode == Mode::kUndo ? W.clone() : host_w.to(W.device());

    const at::Tensor gram = at::mm(w, w.t());
    at::Tensor U = at::triu(gram, 1) + at::diag_embed((at::diagonal(gram) + 1) / 2);
    const at::Tensor eye = at::eye(p.padded, gram.options());
    if (mode == Mode::kDowndate) U = eye - U;
    at::Tensor N = at::linalg_solve_triangular(U, eye, /*upper=*/true);
    if (mode == Mode::kUndo) N = N.t().contiguous();
    const double sign = mode == Mode::kUpdate ? 1 : -1;
    const at::Tensor R = at::mm(w.t(), N).mul_(sign);
    const at::Tensor S = mode == Mode::kUndo ? -w : w;

    struct Rows {
      at::Tensor A, K, M;  // [rows, padded], [rows, ld], what A and its keys give
    };
    std::vector<Rows> all;
    auto take = [&](const at::Tensor& A, const at::Tensor& K) {
      all.push_back({A, K, at::mm(A, N).addmm_(K, R)});
    };
    if (p.below > 0) take(rect(p, 0, p.below), b_.keys.narrow(0, p.first + p.width, p.below));
    if (b_.rhs.defined() && mode != Mode::kUndo) {
      take(b_.rhs.narrow(0, p.first, p.padded).narrow(1, 0, b_.n).t(), b_.keys.narrow(0, b_.padded, b_.n));
    }
    // The panel is written only now, when nothing is left that takes memory and so might throw.
    W.copy_(mode == Mode::kUndo ? host_w : w);
    b_.factor.narrow(0, p.triangle, packed_size(p.width)).copy_(packed);
    for (Rows& rows : all) {
      rows.K.addmm_(rows.M, S, /*beta=*/1, /*alpha=*/-1);
      rows.A.neg_().add_(rows.M);
    }
    return true;
  }

  void forward(int64_t index) override {
    const Panel p(b_.d, index);
    const at::Tensor x = b_.rhs.narrow(0, p.first, p.padded);
    x.copy_(at::linalg_solve_triangular(triangle(p).to(x.device()), x, /*upper=*/false));
    if (p.below > 0) {
      b_.rhs.narrow(0, p.first + p.width, p.below)
          .addmm_(rect(p, 0, p.below), x.narrow(0, 0, p.width), /*beta=*/1, /*alpha=*/-1);
    }
  }

  void backward(int64_t index) override {
    const Panel p(b_.d, index);
    const at::Tensor x = b_.rhs.narrow(0, p.first, p.padded);
    if (p.below > 0) {
      x.narrow(0, 0, p.width)
          .addmm_(rect(p, 0, p.below).t(), b_.rhs.narrow(0, p.first + p.width, p.below), /*beta=*/1,
                  /*alpha=*/-1);
    }
    x.copy_(at::linalg_solve_triangular(triangle(p).to(x.device()).t(), x, /*upper=*/true));
  }

 private:
  at::Tensor rect(const Panel& p, int64_t row, int64_t rows) const {
    return b_.factor.narrow(0, p.rect + row * p.width, rows * p.width).view({rows, p.width});
  }

  at::Tensor triangle(const Panel& p) const {  // [padded, padded] on the host
    const at::Tensor packed = b_.factor.narrow(0, p.triangle, packed_size(p.width)).to(at::kCPU).contiguous();
    at::Tensor D = at::empty({p.padded, p.padded}, packed.options());
    unpack_triangle(packed.data_ptr<T>(), D.data_ptr<T>(), p.width, p.padded);
    return D;
  }

  at::Tensor pack(const Panel& p, const at::Tensor& D) const {
    at::Tensor packed = at::empty({packed_size(p.width)}, D.options());
    pack_triangle(D.data_ptr<T>(), packed.data_ptr<T>(), p.width, p.padded);
    return packed;
  }

  SweepBuffers b_;
};

}  // namespace

std::unique_ptr<FactorSweep> make_portable_sweep(const SweepBuffers& buffers) {
  if (buffers.factor.scalar_type() == at::kDouble) return std::make_unique<PortableSweep<double>>(buffers);
  return std::make_unique<PortableSweep<float>>(buffers);
}

}  // namespace coachhook
